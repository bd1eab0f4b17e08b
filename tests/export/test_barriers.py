"""What onnxruntime would make of a float island between two quantisations, and that barriers keep it from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from handmade_graphs import pixels_for
from island_graphs import island_graph, piece
from onnx_sessions import expose_units, kernels, optimized, run

from mecdeploy.export import ExportConfig, export_model
from mecdeploy.export.emission import islands
from mecdeploy.export.emission.barriers import needs_barrier
from mecdeploy.export.graph import IntegerGraph

RNG = np.random.default_rng(3)
CONSTANTS = {
    "w": RNG.normal(size=(6, 6, 1, 1)), "b": RNG.normal(size=6), "k": RNG.uniform(0.5, 2, (6, 1, 1)),
    "gain": RNG.uniform(0.5, 2, 6), "ones": np.ones(6), "square": RNG.normal(size=(8, 8)), "row": RNG.normal(size=8),
    "none": np.array(0.0), "unit": np.array(1.0),
}  # fmt: skip
HEAD = "island (float[N,6,8,8] x) => (float[N,6,8,8] y) <int64[2] flat = {-1, 8}, int64[4] image = {-1, 6, 8, 8}>"
ROUNDED = {
    "Conv": "y = Conv(x, w, b)",
    "ConvTranspose": "y = ConvTranspose(x, w)",
    "Conv, Relu": "c = Conv(x, w) y = Relu(c)",
    "Conv, Mul": "c = Conv(x, w) y = Mul(c, k)",
    "Conv, BatchNormalization": "c = Conv(x, w) y = BatchNormalization(c, gain, b, b, ones)",
    "Transpose, Conv, Transpose": "a = Transpose<perm=[0,1,3,2]>(x) c = Conv(a, w) y = Transpose<perm=[0,1,3,2]>(c)",
    "Gemm": "a = Reshape(x, flat) c = Gemm(a, square, row) y = Reshape(c, image)",
    "MatMul, Add": "a = Reshape(x, flat) m = MatMul(a, square) c = Add(m, row) y = Reshape(c, image)",
}
"""Float weights, which onnxruntime would round to int8."""

MERGED = {
    "Identity": "y = Identity(x)",
    "Cast": "y = Cast<to = 1>(x)",
    "Dropout": "y = Dropout(x)",
    "x + 0": "y = Add(x, none)",
    "x * 1": "y = Mul(x, unit)",
    "Transpose twice": "a = Transpose<perm=[0,1,3,2]>(x) y = Transpose<perm=[0,1,3,2]>(a)",
}
"""Nothing between two quantisations, of which onnxruntime would make one."""

FREE = {
    "Tanh": "y = Tanh(x)",
    "HardSwish": "y = HardSwish(x)",
    "Conv, Tanh": "c = Conv(x, w) y = Tanh(c)",
    "Conv + x": "c = Conv(x, w) y = Add(c, x)",
    "InstanceNormalization": "y = InstanceNormalization(x, gain, b)",
    "softmax of products": "m = MatMul(x, x) s = Softmax(m) t = MatMul(s, x) y = Transpose<perm=[0,1,3,2]>(t)",
}


def island(body: str) -> IntegerGraph:
    return island_graph(f"{HEAD} {{ {body} }}", **CONSTANTS)


def without_optimiser(data: bytes, pixels: np.ndarray) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"pixels": pixels}), strict=True))


def worst(graph: IntegerGraph, name: str) -> int:
    """The farthest that a value's codes are, in the file as it is served, from those of its nodes one by one."""
    pixels = pixels_for(graph, 4)
    data = export_model(graph, ExportConfig(), {})
    model = onnx.load_from_string(data)
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    expected = without_optimiser(expose_units(data), pixels)[name]
    return int(np.abs(run(model.SerializeToString(), pixels)[name].astype(int) - expected).max())


@pytest.mark.parametrize("case", [*ROUNDED, *MERGED])
def test_a_barrier_keeps_the_codes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = island({**ROUNDED, **MERGED}[case])
    # one step: float sums in another order, and with the optimiser off the convolution behind is a float one
    assert worst(graph, "codes") <= 1
    assert worst(graph, "after") <= 1
    monkeypatch.setattr(islands, "needs_barrier", lambda graph, output: False)
    assert max(worst(graph, "codes"), worst(graph, "after")) > 1, "onnxruntime needs no barrier here any more"


@pytest.mark.parametrize("case", FREE)
def test_other_islands_need_none(case: str, tmp_path: Path) -> None:
    graph = island(FREE[case])
    assert worst(graph, "codes") <= 1
    assert worst(graph, "after") <= 1
    assert kernels(optimized(export_model(graph, ExportConfig(), {}), tmp_path))["Sum"] == 0


@pytest.mark.parametrize("case", [*ROUNDED, "Softmax"])
def test_products_stay_in_float(case: str, tmp_path: Path) -> None:
    body = ROUNDED.get(case, "y = Softmax<axis = 1>(x)")
    found = kernels(optimized(export_model(island(body), ExportConfig(), {}), tmp_path))
    assert found["Sum"] == 1
    assert (found["QLinearConv"], found["QGemm"], found["QLinearSoftmax"]) == (2, 1, 0)
    assert sum(found[kind] for kind in ("Conv", "FusedConv", "ConvTranspose", "Gemm", "Softmax")) == 1


@pytest.mark.parametrize(
    ("body", "needed"),
    [
        ("t = Tanh(x) y = Reshape(t, image)", False),
        ("t = Reshape(x, image) y = Tanh(t)", False),
        ("y = Concat<axis = 1>(x, x)", True),
        ("t = Tanh(x) y = Concat<axis = 1>(t, x)", True),
        ("t = Tanh(x) y = Add(t, x)", False),
        ("half = Constant<value = float {0.5}>() y = Add(x, half)", True),
        ("y = Max(w)", False),
    ],
)
def test_how_far_a_rewrite_sees(body: str, needed: bool) -> None:
    assert needs_barrier(piece(f"{HEAD} {{ {body} }}", **CONSTANTS), "y") is needed
