"""Each reason on a graph that has that one fault, and the same graph without it, as an integer kernel."""

import re
from pathlib import Path

import onnx
import pytest
from one_fault import FAULTS, Sketch, convolution
from qdq_units import token_network

from mecdeploy.runtime_checks import InspectionReport, inspect_model
from mecdeploy.runtime_checks.patterns import Graph
from mecdeploy.runtime_checks.reasons import CONSEQUENCES, why_float

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
        if layer.arithmetic == "integer":  # onnxruntime 1.24 fuses some of them, and computes something else
            assert len(with_it.warnings) == 1 and without.warnings == ()
            return
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


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("graph-input", "its input x is one of the graph's, and is not quantised"),
        ("float-weight", "its weight w is float32, without a DequantizeLinear"),
        (
            "packed-weight",
            "its weight w_q goes into DequantizeLinear as int4; integer kernels take int8, which a Cast before it "
            "makes",
        ),
        ("bias-scale", "the scale of its bias b_q is not input scale times weight scale (up to 2 times off)"),
        ("float-output", "its output y is not quantised: it goes to the graph's output"),
        (
            "output-read-twice",
            "its float output conv goes to Abs node_z, 1 QuantizeLinear, where one QuantizeLinear has to be its only "
            "reader",
        ),
        (
            "activation-before-quantize:Relu",
            "Relu node_between_Relu stands between it and its QuantizeLinear, which clamps less (to -6.4..6.35), so "
            "that it cannot be dropped",
        ),
        ("moved-input", "Flatten node_between_Flatten stands between DequantizeLinear and its input between_Flatten"),
        ("gemm-attributes", "it has a bias, and alpha is 0.5 instead of 1"),
    ],
)
def test_the_words(fault: str, what: str, tmp_path: Path) -> None:
    report = inspected(FAULTS[fault][0](), tmp_path)
    (layer,) = report.layers
    if layer.arithmetic == "integer":  # onnxruntime 1.24, as above
        assert what in report.warnings[0]
    else:
        assert [reason.what for reason in layer.reasons] == [what]


def test_operators_that_are_not_quantised_between_each_other(tmp_path: Path) -> None:
    """Attention: all three operators have kernels, and none gets one."""
    sketch = Sketch()
    sketch.quantize("x", "xq")
    real = sketch.dequantize("xq", "xq", "xd")
    turned = sketch.op("Transpose", [real], "turned", perm=[0, 1, 3, 2])
    shares = sketch.op("Softmax", [sketch.op("Add", [sketch.op("MatMul", [real, turned], "a"), real], "b")], "c")
    sketch.op("MatMul", [shares, real], "y")
    (island,) = inspected(sketch.finish("y"), tmp_path).runtime.islands
    assert [(reason.kind, reason.what) for reason in island.reasons] == [
        (
            "unquantised-inside",
            "MatMul node_a, Add node_b, Softmax node_c and 1 more have integer kernels, but no QuantizeLinear and "
            "DequantizeLinear stand between them",
        )
    ]


def test_our_own_islands_say_what_the_export_said(tmp_path: Path) -> None:
    report = inspected(token_network(), tmp_path)
    assert report.metadata is not None and report.metadata.islands
    found = {reason.what for island in report.runtime.islands for reason in island.reasons if "exported" in reason.kind}
    assert found and all(what.startswith("exported so: ") for what in found)
    assert all(cause in " ".join(found) for cause in report.metadata.islands.values())


def test_where_nothing_is_known_the_pattern_is_shown() -> None:
    """Asked about a convolution that has no fault."""
    model = convolution()
    (node,) = [node for node in model.graph.node if node.op_type == "Conv"]
    (reason,) = why_float(Graph(model.graph), node)
    assert reason.kind == "unknown"
    pattern = "DequantizeLinear, DequantizeLinear, DequantizeLinear -> Conv -> QuantizeLinear"
    assert reason.what == f"no known cause; around it: {pattern}"


def test_every_kind_of_reason_is_documented_and_tried() -> None:
    """Kinds as the sources spell them; those that need more than one fault have tests of their own."""
    sources = Path(inspect_model.__code__.co_filename).parent
    spelled = {kind for path in sources.glob("*.py") for kind in re.findall(r'kind="([a-z-]+)"', path.read_text())}
    document = Path(__file__).parents[2] / "docs" / "inspect.md"
    rows = re.findall(r"^\| ((?:`[a-z-]+`(?:, )?)+) \|", document.read_text(), re.MULTILINE)
    assert {kind.strip("`") for row in rows for kind in row.split(", ")} == spelled
    apart = {"nothing-quantised", "dynamic", "unquantised-inside", "exported-island", "unknown"}
    assert spelled - {fault.split(":")[0] for fault in FAULTS} == apart
