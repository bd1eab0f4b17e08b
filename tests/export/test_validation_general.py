"""The rules of elementwise kernels, windows, movement and float islands, broken once: the error says what is due."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from damages import Damage, node, value
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
from island_graphs import attention_graph, piece, tokens_first_graph
from onnx_sessions import expose_units, run

from mecdeploy.export import ExportConfig, ExportError, emit, validate_graph
from mecdeploy.export.emission.elementwise import LARGEST_PRODUCT_RATIO, LARGEST_SUM_RATIO
from mecdeploy.export.graph import IntegerGraph, Quantization, Value

SOUND = [
    squeeze_excite_graph, swish_graph, dense_graph, shuffle_graph, token_graph, headless_graph, matrix_logits_graph,
    attention_graph, tokens_first_graph,
]  # fmt: skip


@pytest.mark.parametrize("build", SOUND)
def test_sound_graphs_pass(build: Callable[[], IntegerGraph]) -> None:
    validate_graph(build())


def element(kind: int, *, output: bool = False) -> Damage:
    """Declare the last input, or the last output, of island `residual` in another element type."""

    def damage(graph: IntegerGraph) -> IntegerGraph:
        (old,) = (one.graph for one in graph.nodes if one.name == "residual")  # type: ignore[union-attr]
        changed = onnx.GraphProto()
        changed.CopyFrom(old)
        (changed.output if output else changed.input)[-1].type.tensor_type.elem_type = kind
        return node("residual", graph=changed)(graph)

    return damage


def foreign(graph: IntegerGraph) -> IntegerGraph:
    """Give island `gelu` an operator of another domain."""
    made = piece("gelu (float[N,17,20] x) => (float[N,17,20] y) { y = com.microsoft.Gelu(x) }")
    return node("gelu", graph=made)(graph)


def external(graph: IntegerGraph) -> IntegerGraph:
    """Keep a constant of island `gelu` in another file."""
    made = piece("gelu (float[N,17,20] x) => (float[N,17,20] y) { y = Add(x, far) }", far=np.ones(1))
    made.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    return node("gelu", graph=made)(graph)


GENERAL_DAMAGES: dict[str, tuple[Callable[[], IntegerGraph], Damage, str]] = {
    "unknown kind": (
        swish_graph,
        node("swish", kind="swish"),
        "Elementwise swish: is of kind 'swish'; one of mul, sigmoid, hard_sigmoid, leaky_relu is due",
    ),
    "mul of one": (swish_graph, node("swish", inputs=("stem",)), "Elementwise swish: reads 1 values; mul takes 2"),
    "mul shapes": (
        squeeze_excite_graph,
        node("swish", inputs=("wide", "stem")),
        "Elementwise swish: reads wide (6, 5, 4) and stem (13, 12, 9); shapes of one rank that broadcast are due",
    ),
    "mul ranks": (
        squeeze_excite_graph,
        lambda graph: value("stem", shape=(12, 9))(node("stem", output="wide")(graph)),
        "Conv stem: writes wide of shape",
    ),
    "mul vanishes": (
        swish_graph,
        lambda graph: value("stem.gate", scale=2.0**-70)(value("stem", scale=2.0**-70)(graph)),
        "Elementwise swish: the product of its input scales is 7.174648137343064e-43; it must be finite and",
    ),
    "mul too far": (
        swish_graph,
        value("swish", scale=2.0**-40),
        "onnxruntime's int32 holds up to 32768. The training diverged there",
    ),
    "hard sigmoid zero point": (
        squeeze_excite_graph,
        value("gate", zero_point=3),
        "Elementwise gate: its output has zero_point 3; 0 is due, so that codes saturate where the real is 0",
    ),
    "hard sigmoid beyond 1": (
        squeeze_excite_graph,
        value("gate", scale=0.25),
        "Elementwise gate: its output reaches 63.75, scale 0.25 at code 255; it must saturate at 1",
    ),
    "hard sigmoid of nothing": (
        squeeze_excite_graph,
        value("fc2", scale=2.0**-125),
        "Elementwise gate: a sixth of its input's scale",
    ),
    "average too far": (dense_graph, value("halved", scale=2.0**-40), "onnxruntime's int32 holds up to 4194304"),
    "average of the whole image too far": (
        dense_graph,
        value("whole", scale=2.0**-20),
        "AveragePool whole: input scale / (output scale * 9 positions) is",
    ),
    "average of padding": (
        dense_graph,
        node("padded", padding=(1, 3, 0, 0)),
        "AveragePool padded: pads by (1, 3, 0, 0) for windows of (2, 3); each side must be below the window's size",
    ),
    "concat scale": (
        dense_graph,
        value("grown", scale=0.5),
        "Concat all: joins grown with scale 0.5 and zero_point",
    ),
    "concat range": (
        dense_graph,
        lambda graph: value("all", qmin=graph.values["all"].quantization.zero_point)(graph),  # type: ignore[union-attr]
        "the output must hold the codes of every input",
    ),
    "concat axis": (dense_graph, node("joined", axis=0), "along axis 0; an axis from 1, equal sizes along all others"),
    "concat sizes": (
        dense_graph,
        node("joined", inputs=("maxpool", "stem")),
        "Concat joined: joins maxpool (5, 6, 5) and stem (5, 12, 10) along axis 1",
    ),
    "reshape": (
        shuffle_graph,
        value("groups", shape=(2, 4, 12, 11)),
        "Reshape groups: makes (2, 4, 12, 11) of joined (8, 12, 10); both must hold as many codes",
    ),
    "reshape requantizes": (shuffle_graph, value("groups", qmax=255), "Reshape groups: moves codes from joined"),
    "transpose of the batch": (
        shuffle_graph,
        node("swapped", permutation=(1, 0, 2, 3, 4)),
        "Transpose swapped: permutation (1, 0, 2, 3, 4) of a value of shape (2, 4, 12, 10); an order of 0..4 that",
    ),
    "transpose twice the same": (shuffle_graph, node("swapped", permutation=(0, 1, 1, 3, 4)), "an order of 0..4"),
    "slice of the batch": (
        shuffle_graph,
        node("left", axis=0),
        "Slice left: cuts axis 0 of a value of shape (8, 12, 10); axes 1..3 can be cut",
    ),
    "slice beyond": (
        shuffle_graph,
        node("right", stop=9),
        "Slice right: takes 4:9:1 of 8 codes; 0 <= start < stop <= size and a step from 1 are due",
    ),
    "slice backwards": (shuffle_graph, node("right", step=-1), "Slice right: takes 4:8:-1 of 8 codes"),
    "gemm features": (
        token_graph,
        node("hidden", input="rows"),
        "Gemm hidden: weight codes have shape (21, 12) and the value it reads (12, 16); (O, I) and (..., I) are due",
    ),
    "dequantize inside": (
        headless_graph,
        lambda graph: replace(
            node("dequantize", output="real")(graph),
            values={**graph.values, "real": Value(name="real", shape=(10,), quantization=None)},
        ),
        "Dequantize dequantize: writes real; it is for the graph's output logits alone",
    ),
    "gemm reads a float": (
        attention_graph,
        node("qkv", input="embed.normed"),
        "Gemm qkv: reads embed.normed, which is float; only a FloatIsland and a Quantize may",
    ),
    "quantized twice": (
        attention_graph,
        node("qkv.in", input="tokens"),
        "Quantize qkv.in: quantizes tokens, which is quantized already; onnxruntime would merge the two",
    ),
    "gemm then quantize": (
        attention_graph,
        node("hidden.in", input="out"),
        "Quantize hidden.in: quantizes out, which a Gemm writes; let the Gemm write codes",
    ),
    "island writes codes": (
        attention_graph,
        lambda graph: value("gelu.y", quantization=graph.values["back.in"].quantization)(graph),
        "FloatIsland gelu: writes gelu.y with a quantization; its output is float, and a Quantize makes codes of it",
    ),
    "quantize writes a float": (
        attention_graph,
        value("back.in", quantization=None),
        "Quantize back.in: writes back.in without a quantization",
    ),
    "island inputs": (attention_graph, node("gelu", inputs=()), "FloatIsland gelu: names 0 inputs; its graph has 1"),
    "island outputs": (
        attention_graph,
        node("residual", outputs=("residual.total",)),
        "FloatIsland residual: names 1 outputs; its graph has 2",
    ),
    "island reads a float as codes": (
        attention_graph,
        element(onnx.TensorProto.UINT8),
        "FloatIsland residual: reads out as UINT8; FLOAT, or UINT8 for codes, is due",
    ),
    "island reads doubles": (
        attention_graph,
        element(onnx.TensorProto.DOUBLE),
        "FloatIsland residual: reads out as DOUBLE",
    ),
    "island writes integers": (
        attention_graph,
        element(onnx.TensorProto.INT64, output=True),
        "FloatIsland residual: writes residual.normed as INT64; FLOAT is due",
    ),
    "images on another axis": (
        dense_graph,
        value("joined", batch_axis=1),
        "Concat joined: uses joined, which has images on axis 1; only FloatIslands, Quantizes and Gemms may",
    ),
    "images moved": (
        tokens_first_graph,
        value("hidden", batch_axis=0),
        "Gemm hidden: moves images from axis 1 of codes to axis 0 of hidden; they stay",
    ),
    "images for features": (
        tokens_first_graph,
        lambda graph: value("codes", batch_axis=2)(
            value("to_tokens.y", batch_axis=2)(value("hidden", batch_axis=2)(graph))
        ),
        "Gemm hidden: reads codes, whose last axis is that of the images; features are due there",
    ),
    "no such axis": (dense_graph, value("joined", batch_axis=4), "value joined: batch_axis is 4; its shape (9, 6, 5)"),
    "logits on another axis": (
        dense_graph,
        value("logits", batch_axis=1),
        "dense: the output logits has images on axis 1; 0 is due",
    ),
    "foreign operator": (attention_graph, foreign, "FloatIsland gelu: holds com.microsoft.Gelu; only ONNX's own"),
    "island reads what is not there": (
        attention_graph,
        node("gelu", graph=piece("gelu (float[N,17,20] x) => (float[N,17,20] y) { y = Add(x, z) }")),
        "FloatIsland gelu: its Add reads z, which nothing in its graph writes before it",
    ),
    "island without an end": (
        attention_graph,
        node("gelu", graph=piece("gelu (float[N,17,20] x) => (float[N,17,20] y) { z = Tanh(x) }")),
        "FloatIsland gelu: its output y is written by nothing in its graph",
    ),
    "external data": (attention_graph, external, "FloatIsland gelu: keeps far in another file; load it into its"),
}


@pytest.mark.parametrize("damage", GENERAL_DAMAGES)
def test_a_broken_rule_of_the_general_nodes_is_named(damage: str) -> None:
    build, change, message = GENERAL_DAMAGES[damage]
    with pytest.raises(ExportError, match=re.escape(message)):
        validate_graph(change(build()))


LIMITS = {"mul": LARGEST_PRODUCT_RATIO, "add": LARGEST_SUM_RATIO, "average": LARGEST_SUM_RATIO}


@pytest.mark.parametrize("kind", LIMITS)
def test_the_int32_limits_are_where_the_kernels_have_them(kind: str) -> None:
    """At a limit positive reals saturate at 255 still; beyond what int32 holds, onnxruntime makes them 0."""
    assert _code_of_the_largest(kind, LIMITS[kind]) == 255
    assert _code_of_the_largest(kind, LIMITS[kind] * 1e6) == 0


def _code_of_the_largest(kind: str, ratio: float) -> int:
    """What onnxruntime makes of white pixels where input scale / output scale is `ratio`; validation left out."""
    make = Maker("limit", (4, 2, 2), 0, zero_point=0)
    unit = Quantization(scale=1.0, zero_point=0, qmax=255)
    make.values["pixels"] = replace(make.values["pixels"], quantization=unit)
    made = {
        "mul": lambda: make.mul("y", "pixels", "pixels", 8),
        "add": lambda: make.add("y", "pixels", "pixels", act=(8, False))[0],
        "average": lambda: make.average_pool("y", "pixels", 2, 1, 8, padding=1),
    }[kind]()
    scale = float(np.float32(1 / ratio))
    make.values[made] = replace(make.values[made], quantization=replace(unit, scale=scale))
    make.dequantize(made)
    graph = make.graph()
    data = emit(graph, ExportConfig(), {}).SerializeToString()
    return int(run(expose_units(data), np.full((1, 4, 2, 2), 255, np.uint8))[made][0, 0, 0, 0])
