"""IntegerGraphs with float islands, their pieces of ONNX written out as text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from graph_maker import Maker
from onnx import GraphProto, numpy_helper

from mecdeploy.export.graph import FloatIsland, IntegerGraph

EMBED = """
embed (uint8[N,3,16,16] pixels, float[N,16,12] x) => (float[N,17,12] joined, float[N,17,12] normed)
<int64[1] zero = {0}, int64[1] one = {1}, int64[2] rest = {1, 12}>
{
    shape = Shape(pixels)
    batch = Slice(shape, zero, one)
    size = Concat<axis = 0>(batch, rest)
    first = Expand(token, size)
    tokens = Concat<axis = 1>(first, x)
    joined = Add(tokens, position)
    normed = LayerNormalization<axis = -1>(joined, gain, shift)
}
"""
ATTEND = """
attend (uint8[N,3,16,16] pixels, float[N,17,36] qkv) => (float[N,17,12] out)
<int64[1] zero = {0}, int64[1] one = {1}, int64[4] heads = {17, 3, 4, 3}, int64[2] row = {17, 12},
 int64 q_at = {0}, int64 k_at = {1}, int64 v_at = {2}, float scale = {0.57735}>
{
    shape = Shape(pixels)
    batch = Slice(shape, zero, one)
    split_size = Concat<axis = 0>(batch, heads)
    split = Reshape(qkv, split_size)
    moved = Transpose<perm = [2, 0, 3, 1, 4]>(split)
    q = Gather<axis = 0>(moved, q_at)
    k = Gather<axis = 0>(moved, k_at)
    v = Gather<axis = 0>(moved, v_at)
    turned = Transpose<perm = [0, 1, 3, 2]>(k)
    scores = MatMul(q, turned)
    scaled = Mul(scores, scale)
    weights = Softmax<axis = -1>(scaled)
    mixed = MatMul(weights, v)
    back = Transpose<perm = [0, 2, 1, 3]>(mixed)
    row_size = Concat<axis = 0>(batch, row)
    out = Reshape(back, row_size)
}
"""
RESIDUAL = """
residual (float[N,17,12] a, float[N,17,12] b) => (float[N,17,12] total, float[N,17,12] normed)
{
    total = Add(a, b)
    normed = LayerNormalization<axis = -1>(total, gain, shift)
}
"""
GELU = "gelu (float[N,17,20] x) => (float[N,17,20] y) { y = Gelu(x) }"
FIRST = """
first (float[N,17,12] a, float[N,17,12] b) => (float[N,12] y) <int64 zero = {0}>
{
    total = Add(a, b)
    normed = LayerNormalization<axis = -1>(total, gain, shift)
    y = Gather<axis = 1>(normed, zero)
}
"""
TO_TOKENS = """
to_tokens (float[N,12,4,4] x) => (float[16,N,12] y) <int64[3] size = {0, 12, 16}>
{
    flat = Reshape(x, size)
    moved = Transpose<perm = [2, 0, 1]>(flat)
    y = LayerNormalization<axis = -1>(moved, gain, shift)
}
"""
TO_IMAGES = """
to_images (float[16,N,12] x, float[16,N,7] z) => (float[N,19] y)
{
    both = Concat<axis = 2>(x, z)
    y = ReduceMean<keepdims = 0>(both, first)
}
"""
CALM = "calm (float[N,10] x) => (float[N,10] y) { y = LogSoftmax(x) }"


def piece(text: str, **constants: np.ndarray) -> GraphProto:
    """Parse a graph and give it constants of float32."""
    graph = onnx.parser.parse_graph(text)
    for name, array in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
    return graph


def attention_graph(weight_bits: int = 4, act_bits: int = 4, *, seed: int = 20, calm: bool = False) -> IntegerGraph:
    """A vision transformer's block: four Gemms on integers, everything between them in float.

    calm: the logits come from an island too.
    """
    make = Maker("attention", (3, 16, 16), seed)
    bits = {"weight_bits": weight_bits}
    norm = {"gain": make.rng.uniform(0.5, 1.5, 12), "shift": make.rng.normal(size=12) / 4}
    start = {"token": make.rng.normal(size=(1, 1, 12)) / 4, "position": make.rng.normal(size=(1, 17, 12)) / 8}
    patches = make.learned(make.conv("patches", "pixels", 12, 4, stride=4, weight_bits=8, act_bits=8, signed=True))
    tokens = make.transpose("tokens", make.reshape("rows", patches, (12, 16)), 0, 2, 1)
    shape = (17, 12)

    def gemm(name: str, source: str, features: int) -> str:
        codes = make.quantize(f"{name}.in", source, act_bits)
        return make.gemm(name, codes, features, act_bits=None, output=name, **bits)

    stream, normed = make.island("embed", ["pixels", tokens], piece(EMBED, **start, **norm), joined=shape, normed=shape)
    (mixed,) = make.island("attend", ["pixels", gemm("qkv", normed, 36)], piece(ATTEND), out=shape)
    stream, normed = make.island(
        "residual", [stream, gemm("out", mixed, 12)], piece(RESIDUAL, **norm), total=shape, normed=shape
    )
    (active,) = make.island("gelu", [gemm("hidden", normed, 20)], piece(GELU), y=(17, 20))
    (first,) = make.island("first", [stream, gemm("back", active, 12)], piece(FIRST, **norm), y=(12,))
    codes = make.quantize("classifier.in", first, 8)
    make.gemm("classifier", codes, 10, weight_bits=8, act_bits=None, output="scores" if calm else None)
    return _ended_by_island(make.graph(), "calm", "scores", piece(CALM)) if calm else make.graph()


def tokens_first_graph(weight_bits: int = 4, act_bits: int = 4, *, seed: int = 22) -> IntegerGraph:
    """torch's attention keeps tokens before images: two Gemms, one of integers on both sides, over such values."""
    make = Maker("tokens-first", (3, 16, 16), seed)
    norm = {"gain": make.rng.uniform(0.5, 1.5, 12), "shift": make.rng.normal(size=12) / 4}
    patches = make.learned(make.conv("patches", "pixels", 12, 4, stride=4, weight_bits=8, act_bits=8, signed=True))
    (tokens,) = make.island("to_tokens", [patches], piece(TO_TOKENS, **norm), batch_axis=1, y=(16, 12))
    codes = make.quantize("codes", tokens, act_bits)
    hidden = make.gemm("hidden", codes, 9, weight_bits=weight_bits, act_bits=act_bits)
    back = make.gemm("back", hidden, 7, weight_bits=weight_bits, act_bits=None, output="back")
    ending = piece(TO_IMAGES)
    ending.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "first"))
    (pooled,) = make.island("to_images", [tokens, back], ending, y=(19,))
    make.gemm("classifier", make.quantize("classifier.in", pooled, 8), 10, weight_bits=8, act_bits=None)
    return make.graph()


def _ended_by_island(graph: IntegerGraph, name: str, source: str, ending: GraphProto) -> IntegerGraph:
    """The graph with an island behind `source` that writes the logits."""
    island = FloatIsland(
        name=name, inputs=(source,), outputs=("logits",), graph=ending, operators=("log_softmax",), reason="a test"
    )
    values = {**graph.values, "logits": replace(graph.values[source], name="logits")}
    return replace(graph, values=values, nodes=(*graph.nodes, island))


def island_graph(text: str, *, act_bits: int = 8, seed: int = 21, **constants: np.ndarray) -> IntegerGraph:
    """One island of `text`, from x to y, both [N, 6, 8, 8], between two convolutions."""
    make = Maker("island", (3, 8, 8), seed)
    stem = make.conv("stem", "pixels", 6, 3, weight_bits=8, act_bits=8, signed=True, padding=1)
    (made,) = make.island("island", [stem], piece(text, **constants), y=(6, 8, 8))
    after = make.conv("after", make.quantize("codes", made, act_bits), 7, 1, weight_bits=4, act_bits=8)
    flat = make.flatten("flat", make.pool("pool", after, 8))
    make.gemm("classifier", flat, 10, weight_bits=8, act_bits=None)
    return make.graph()
