"""Committed portable files on whichever onnxruntime is installed. Needs numpy, onnxruntime and pytest alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

FOLDER = Path(__file__).parent / "golden"
EXPECTED_KERNELS = {
    "residual-w4a4": {"QLinearConv": 6, "QLinearAdd": 3, "QGemm": 2, "QLinearGlobalAveragePool": 1},
    "depthwise-w2a4": {"QLinearConv": 6, "QLinearAdd": 1, "QGemm": 1},
    "squeeze-excite": {
        "QLinearConv": 5,
        "QLinearAdd": 2,
        "QLinearMul": 2,
        "QLinearGlobalAveragePool": 2,
        "QGemm": 1,
    },
    "dense": {"QLinearConv": 5, "QLinearAveragePool": 4, "Concat": 2, "QGemm": 1},
}


def session(name: str, **options: object) -> onnxruntime.InferenceSession:
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = 1
    for key, value in options.items():
        setattr(chosen, key, value)
    return onnxruntime.InferenceSession(str(FOLDER / f"{name}.onnx"), chosen, providers=["CPUExecutionProvider"])


def test_every_golden_file_is_tested_and_small() -> None:
    models = {path.stem: path.stat().st_size for path in FOLDER.glob("*.onnx")}
    assert models.keys() == EXPECTED_KERNELS.keys()
    assert max(models.values()) < 60_000


@pytest.mark.parametrize("name", EXPECTED_KERNELS)
def test_every_unit_computes_the_expected_integers(name: str) -> None:
    runner = session(name)
    names = [output.name for output in runner.get_outputs()]
    with np.load(FOLDER / f"{name}.npz") as expected:
        assert {*names, "pixels"} == set(expected.files)
        for output, found in zip(names, runner.run(names, {"pixels": expected["pixels"]}), strict=True):
            assert found.dtype == expected[output].dtype, output
            np.testing.assert_array_equal(found, expected[output], err_msg=output)


@pytest.mark.parametrize("name", EXPECTED_KERNELS)
def test_every_kernel_is_an_integer_kernel(name: str, tmp_path: Path) -> None:
    runner = session(name, enable_profiling=True, profile_file_prefix=str(tmp_path / "profile"))
    with np.load(FOLDER / f"{name}.npz") as expected:
        runner.run(["logits"], {"pixels": expected["pixels"]})
    events = json.loads(Path(runner.end_profiling()).read_text())
    executed = Counter(
        event["args"]["op_name"]
        for event in events
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
    )
    assert EXPECTED_KERNELS[name].items() <= executed.items()
    assert set(executed) - set(EXPECTED_KERNELS[name]) <= {"MaxPool", "NhwcMaxPool", "Flatten", "Clip", "Transpose"}
