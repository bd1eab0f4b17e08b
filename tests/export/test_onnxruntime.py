"""What onnxruntime makes of the emitted files: integer kernels only, and the witness's integers, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from handmade_graphs import depthwise_graph, odd_graph, pixels_for, residual_graph, tie_graph
from integer_witness import evaluate
from onnx_sessions import expose_units, kernels, optimized, profile, run

from mecdeploy.export import ExportConfig, export_model
from mecdeploy.export.graph import Add, Conv, Gemm, IntegerGraph

BITS = (2, 3, 4, 8)
TARGETS = ("onnxruntime", "portable")
GRAPHS: dict[str, Callable[..., IntegerGraph]] = {
    "residual": residual_graph,
    "depthwise": depthwise_graph,
    "odd": odd_graph,
}


def export(graph: IntegerGraph, **options: object) -> bytes:
    return export_model(graph, ExportConfig(**options), {})  # type: ignore[arg-type]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weight_bits", BITS)
@pytest.mark.parametrize("name", GRAPHS)
def test_every_kernel_is_an_integer_kernel(name: str, weight_bits: int, target: str, tmp_path: Path) -> None:
    graph = GRAPHS[name](weight_bits)
    found = kernels(optimized(export(graph, target=target), tmp_path))
    # layout changes and saturation at qmax are the only company the kernels have; no Cast, Gather or float Conv is left
    assert set(found) <= {
        "QLinearConv", "QGemm", "QLinearAdd", "QLinearGlobalAveragePool", "MaxPool", "NhwcMaxPool", "Flatten",
        "Clip", "Transpose",
    }  # fmt: skip
    assert found["QLinearConv"] == sum(isinstance(node, Conv) for node in graph.nodes)
    assert found["QGemm"] == sum(isinstance(node, Gemm) for node in graph.nodes)
    assert found["QLinearAdd"] == sum(len(node.outputs) for node in graph.nodes if isinstance(node, Add))


@pytest.mark.parametrize("name", GRAPHS)
def test_pooling_stays_on_uint8(name: str, tmp_path: Path) -> None:
    graph = GRAPHS[name]()
    executed = profile(export(graph), pixels_for(graph, 1), tmp_path)
    pools = [kernel for kernel in executed if "MaxPool" in kernel.op_type]
    assert [(pool.input_types, pool.output_types) for pool in pools] == [(["uint8"], ["uint8"])]
    assert not any("float" in kernel.input_types for kernel in executed if kernel.op_type in {"Clip", "Flatten"})


@pytest.mark.parametrize("weight_bits", BITS)
@pytest.mark.parametrize("name", GRAPHS)
def test_every_unit_computes_the_witness_integers(name: str, weight_bits: int) -> None:
    for act_bits in (2, 4, 8):
        graph = GRAPHS[name](weight_bits, act_bits)
        pixels = pixels_for(graph, 4)
        computed = run(expose_units(export(graph)), pixels)
        assert computed.keys() == graph.values.keys() - {"pixels"}
        expected = evaluate(graph, pixels)
        for value, codes in computed.items():
            np.testing.assert_array_equal(codes, expected[value], err_msg=f"{graph.name} {value}")


def test_ties_and_saturation_compute_the_witness_integers() -> None:
    graph = tie_graph()
    pixels = pixels_for(graph, 40)
    expected = evaluate(graph, pixels)
    # the case is what it claims: left rounds acc / 8 (scales 1 * 0.5 / 4), so a remainder of 4 is a tie
    left = graph.nodes[0]
    assert isinstance(left, Conv)
    products = (pixels.astype(int) - 128) * left.weight.codes.reshape(1, 8, 1, 1) + left.bias.reshape(8, 1, 1)
    assert (products % 8 == 4).mean() > 0.05
    assert {0, 15} <= set(expected["right"].flat) & set(expected["sum"].flat)
    for value, codes in run(expose_units(export(graph)), pixels).items():
        np.testing.assert_array_equal(codes, expected[value], err_msg=value)


@pytest.mark.parametrize("name", GRAPHS)
def test_targets_and_packed_widths_agree_bit_for_bit(name: str) -> None:
    graph = GRAPHS[name](2)
    pixels = pixels_for(graph, 3)
    expected = evaluate(graph, pixels)["logits"]
    for target in TARGETS:
        for bits in BITS:
            logits = run(export(graph, target=target, bits=bits), pixels)["logits"]
            np.testing.assert_array_equal(logits, expected, err_msg=f"{target} {bits}")


@pytest.mark.parametrize("name", GRAPHS)
def test_a_float_input_quantizes_to_the_pixels_it_came_from(name: str, tmp_path: Path) -> None:
    graph = GRAPHS[name]()
    pixels = pixels_for(graph, 3)
    data = export(graph, input="float")
    from_pixels = run(expose_units(export(graph)), pixels)
    from_images = run(expose_units(data), pixels.astype(np.float32) / np.float32(255))
    for value, codes in from_pixels.items():
        np.testing.assert_array_equal(codes, from_images[value], err_msg=value)
    found = kernels(optimized(data, tmp_path))
    assert found["QuantizeLinear"] == 1
    assert found["Conv"] == 0


def test_every_pixel_survives_the_float_input() -> None:
    pixels = np.arange(256, dtype=np.uint8)
    steps = pixels.astype(np.float32) / np.float32(255) / (np.float32(1) / np.float32(255))
    np.testing.assert_array_equal(np.rint(steps), pixels)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_batch_is_free(name: str) -> None:
    graph = GRAPHS[name]()
    data = export(graph)
    pixels = pixels_for(graph, 5)
    whole = run(data, pixels)["logits"]
    assert whole.shape[0] == 5
    for index in range(5):
        np.testing.assert_array_equal(run(data, pixels[index : index + 1])["logits"], whole[index : index + 1])


@pytest.mark.parametrize("target", TARGETS)
def test_the_rewrite_for_cpus_without_vnni_loads_and_computes_the_witness_integers(target: str) -> None:
    graph = residual_graph(8, 8)
    for node in graph.nodes:
        if isinstance(node, Conv | Gemm):
            node.weight.codes.flat[0] = -128  # beyond 7 bits: what the rewrite is for
    data = expose_units(export(graph, target=target))
    images = pixels_for(graph, 2)

    computed = run(data, images, session_x64quantprecision="1")

    expected = evaluate(graph, images)
    for name, codes in computed.items():
        np.testing.assert_array_equal(codes, expected[name], err_msg=name)
