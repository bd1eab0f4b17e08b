"""The portable target in OpenVINO: it loads, runs integer kernels and computes the same integers.

With f32 as the precision of what stays float: OpenVINO's own default may be bf16, which rounds integers above 256.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from general_graphs import dense_graph, shuffle_graph, squeeze_excite_graph, swish_graph, token_graph
from handmade_graphs import depthwise_graph, odd_graph, pixels_for, residual_graph
from integer_witness import evaluate
from level_graphs import GRIDS, on_grid
from onnx_sessions import expose_units

from mecdeploy.export import ExportConfig, export_model
from mecdeploy.export.graph import Add, Conv, Gemm, IntegerGraph

openvino = pytest.importorskip("openvino")

PORTABLE = ExportConfig(target="portable")
GRAPHS: dict[str, Callable[..., IntegerGraph]] = {
    "residual": residual_graph,
    "depthwise": depthwise_graph,
    "odd": odd_graph,
    "squeeze-excite": squeeze_excite_graph,
    "swish": swish_graph,
    "dense": dense_graph,
    "shuffle": shuffle_graph,
    "tokens": token_graph,
}


def compiled(data: bytes) -> Any:
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return core.compile_model(core.read_model(data), "CPU", options)


def run(data: bytes, pixels: np.ndarray) -> dict[str, np.ndarray]:
    model = compiled(data)
    results = model({"pixels": pixels})
    return {output.get_any_name(): results[output] for output in model.outputs}


@pytest.mark.parametrize("weight_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_unit_computes_the_witness_integers(name: str, weight_bits: int) -> None:
    graph = GRAPHS[name](weight_bits)
    pixels = pixels_for(graph, 4)
    expected = evaluate(graph, pixels)
    for value, found in run(expose_units(export_model(graph, PORTABLE, {})), pixels).items():
        if value == "logits":
            # OpenVINO rounds the bias and the product of scales in another order: a float32 step of the largest logit
            step = np.spacing(np.abs(expected[value]).max())
            np.testing.assert_allclose(found, expected[value], rtol=0, atol=2 * step)
        else:
            np.testing.assert_array_equal(found, expected[value], err_msg=value)


@pytest.mark.parametrize("grid", ["binary", "ternary", "odd, 3 bits", "learned, 2 bits", "codebook"])
def test_weights_on_levels_compute_the_witness_integers(grid: str) -> None:
    graph = on_grid(depthwise_graph(4), GRIDS[grid])
    pixels = pixels_for(graph, 4)
    expected = evaluate(graph, pixels)
    for value, found in run(expose_units(export_model(graph, PORTABLE, {})), pixels).items():
        if value != "logits":
            np.testing.assert_array_equal(found, expected[value], err_msg=value)


@pytest.mark.parametrize(("name", "output"), [("residual", "block1.add/skip"), ("depthwise", "add/act")])
def test_a_fused_residual_sum_is_one_rounding_away(name: str, output: str) -> None:
    """With only the sum observed, OpenVINO adds to the convolution's result before rounding it: one rounding, not two.

    The rounding left out is at most half a step of the convolution's output; so the sum's code moves by no more than
    that, in its own steps, and one for its own rounding.
    """
    graph = GRAPHS[name]()
    pixels = pixels_for(graph, 8)
    expected = evaluate(graph, pixels)[output]
    (add,) = (node for node in graph.nodes if isinstance(node, Add) and output in node.outputs)
    left, total = graph.values[add.inputs[0]].quantization, graph.values[output].quantization
    assert left is not None
    assert total is not None
    model = onnx.load_from_string(export_model(graph, PORTABLE, {}))
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.UINT8, None))
    found = run(model.SerializeToString(), pixels)[output]
    assert np.abs(found.astype(int) - expected).max() <= int(0.5 * left.scale / total.scale) + 1


PLAIN = {f"{bits} bits": depthwise_graph(bits) for bits in (2, 3, 4)}
WEIGHTS = {**PLAIN, **{name: on_grid(depthwise_graph(4), grid) for name, grid in GRIDS.items()}}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_convolutions_run_as_int8(weights: str) -> None:
    graph = WEIGHTS[weights]
    info = [op.get_rt_info() for op in compiled(export_model(graph, PORTABLE, {})).get_runtime_model().get_ops()]
    precisions = [
        (str(entry["layerType"].astype(str)), str(entry["runtimePrecision"].astype(str)))
        for entry in info
        if str(entry["layerType"].astype(str)) in ("Convolution", "FullyConnected", "MatMul")
    ]
    assert {precision for _, precision in precisions} == {"u8"}
    assert len(precisions) == sum(isinstance(node, Conv | Gemm) for node in graph.nodes)
