"""Elementwise kernels, windows, movement of codes and Gemms over tokens: integer kernels, the witness's integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from general_graphs import (
    dense_graph,
    headless_graph,
    matrix_logits_graph,
    shuffle_graph,
    squeeze_excite_graph,
    swish_graph,
    token_graph,
)
from graph_maker import Maker
from handmade_graphs import pixels_for
from integer_witness import evaluate
from onnx_sessions import expose_units, kernels, optimized, run
from random_graphs import random_graph

from mecdeploy.export import ExportConfig, compile_graph, export_model
from mecdeploy.export.graph import Conv, Gemm, IntegerGraph

BITS = (2, 3, 4, 8)
TARGETS = ("onnxruntime", "portable")
GRAPHS: dict[str, Callable[..., IntegerGraph]] = {
    "squeeze-excite": squeeze_excite_graph,
    "swish": swish_graph,
    "dense": dense_graph,
    "shuffle": shuffle_graph,
    "tokens": token_graph,
    "headless": headless_graph,
}
KERNELS = {
    "squeeze-excite": {
        "QLinearConv": 5, "QLinearGlobalAveragePool": 2, "QLinearAdd": 2, "QLinearMul": 2, "QGemm": 1,
    },
    "swish": {
        "QLinearConv": 3, "QLinearSigmoid": 2, "QLinearMul": 2, "QLinearLeakyRelu": 2, "QLinearGlobalAveragePool": 1,
        "QGemm": 1,
    },
    "dense": {"QLinearConv": 5, "Concat": 2, "QLinearAveragePool": 4, "QGemm": 1},
    "shuffle": {"QLinearConv": 5, "Concat": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "tokens": {"QLinearConv": 1, "QGemm": 3, "QLinearAdd": 1},
    "headless": {"QLinearConv": 2, "QLinearGlobalAveragePool": 1, "DequantizeLinear": 1},
}  # fmt: skip
MOVEMENT = {
    "MaxPool", "NhwcMaxPool", "Flatten", "Clip", "Transpose", "Reshape", "Squeeze", "Slice", "Split",
}  # fmt: skip
"""The company of integer kernels; onnxruntime makes a Split of two Slices and a Squeeze of some Reshapes."""


def export(graph: IntegerGraph, **options: object) -> bytes:
    return export_model(graph, ExportConfig(**options), {})  # type: ignore[arg-type]


def assert_witness_integers(graph: IntegerGraph, data: bytes, count: int) -> None:
    pixels = pixels_for(graph, count)
    computed, expected = run(expose_units(data), pixels), evaluate(graph, pixels)
    assert computed.keys() == compile_graph(graph, ExportConfig()).values.keys() - {"pixels"}
    for value, codes in computed.items():
        np.testing.assert_array_equal(codes, expected[value], err_msg=f"{graph.name} {value}")
    # a value that is looked at may hold back a fusion: the file as it is served computes the same
    np.testing.assert_array_equal(run(data, pixels)["logits"], expected["logits"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("exposed", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_kernel_is_an_integer_kernel(name: str, exposed: bool, target: str, tmp_path: Path) -> None:
    data = export(GRAPHS[name](), target=target)
    found = kernels(optimized(expose_units(data) if exposed else data, tmp_path))
    assert {kind: count for kind, count in found.items() if kind not in MOVEMENT} == KERNELS[name]


@pytest.mark.parametrize("act_bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_unit_computes_the_witness_integers(name: str, count: int, act_bits: int) -> None:
    graph = GRAPHS[name](4, act_bits)
    assert_witness_integers(graph, export(graph), count)


@pytest.mark.parametrize("name", GRAPHS)
def test_targets_and_packed_widths_agree_bit_for_bit(name: str) -> None:
    graph = GRAPHS[name](2)
    pixels = pixels_for(graph, 2)
    expected = evaluate(graph, pixels)["logits"]
    for target in TARGETS:
        for bits in BITS:
            logits = run(export(graph, target=target, bits=bits), pixels)["logits"]
            np.testing.assert_array_equal(logits, expected, err_msg=f"{target} {bits}")


@pytest.mark.parametrize("name", GRAPHS)
def test_the_rewrite_for_cpus_without_vnni_computes_the_witness_integers(name: str) -> None:
    graph = GRAPHS[name](8, 8)
    for node in graph.nodes:
        if isinstance(node, Conv | Gemm):
            node.weight.codes.flat[0] = -128  # beyond 7 bits: what the rewrite is for
    pixels = pixels_for(graph, 2)
    computed = run(expose_units(export(graph)), pixels, session_x64quantprecision="1")
    expected = evaluate(graph, pixels)
    for value, codes in computed.items():
        np.testing.assert_array_equal(codes, expected[value], err_msg=value)


def test_logits_may_have_more_than_one_axis() -> None:
    graph = matrix_logits_graph()
    assert_witness_integers(graph, export(graph), 2)
    assert run(export(graph), pixels_for(graph, 2))["logits"].shape == (2, 16, 10)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("channels", [1, 5])
def test_a_hard_sigmoid_rounds_ties_the_same_in_every_shape(channels: int, width: int) -> None:
    """Its kernel could exchange its operands where the innermost size is 1: see emission/elementwise.py."""
    for seed in range(12):
        make = Maker("tied", (1, 9, width), seed)
        wide = make.conv("wide", "pixels", channels, 1, weight_bits=8, act_bits=4, signed=True)
        gate = make.gate("gate", "hard_sigmoid", wide, 4, reach=1.0)
        make.gemm("classifier", make.flatten("flat", gate), 10, weight_bits=8, act_bits=None)
        graph = make.graph()
        # x = 0 is a tie: 1 / 2 lies between the codes 7 and 8
        assert (evaluate(graph, pixels_for(graph, 20))["wide"] == make.codes("wide").zero_point).any()
        assert_witness_integers(graph, export(graph), 20)


@pytest.mark.parametrize("seed", range(24))
def test_random_graphs_compute_the_witness_integers(seed: int) -> None:
    graph = random_graph(seed)
    assert_witness_integers(graph, export(graph, target=TARGETS[seed % 2]), 3)
