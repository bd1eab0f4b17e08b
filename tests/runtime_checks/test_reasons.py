"""Each reason on a graph that has that one fault, and the same graph without it, as an integer kernel."""

from pathlib import Path

import onnx
import pytest
from one_fault import FAULTS

from mecdeploy.runtime_checks import InspectionReport, inspect_model
from mecdeploy.runtime_checks.reasons import CONSEQUENCES

OPERATOR = "node_r"
"""The operator under test in graphs without a layer."""


def inspected(model: onnx.ModelProto, folder: Path) -> InspectionReport:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return inspect_model(path)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_the_reason_and_without_it_there_is_none(fault: str, tmp_path: Path) -> None:
    with_it, without = (inspected(make(), tmp_path) for make in FAULTS[fault])
    kind = fault.split(":")[0]
    if with_it.layers:
        (layer,) = with_it.layers
        assert layer.arithmetic == "float"
        assert [reason.kind for reason in layer.reasons] == [kind], layer.reasons
        (repaired,) = without.layers
        assert (repaired.arithmetic, repaired.reasons) == ("integer", ())
        if kind not in CONSEQUENCES:  # where it begins, is at the operator beside it
            assert layer.reasons[0] in [reason for island in with_it.runtime.islands for reason in island.reasons]
    else:
        (island,) = [island for island in with_it.runtime.islands if OPERATOR in island.nodes]
        assert [reason.kind for reason in island.reasons] == [kind], island.reasons
        assert not any(OPERATOR in island.nodes for island in without.runtime.islands)
