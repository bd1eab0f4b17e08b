"""Every rule of an IntegerGraph, broken once: the error names the node, the value and what is due."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from damages import Damage, node, value, weight
from handmade_graphs import depthwise_graph, odd_graph, residual_graph, tie_graph

from mecdeploy.export import ExportError, validate_graph
from mecdeploy.export.graph import IntegerGraph, Value


@pytest.mark.parametrize("build", [residual_graph, depthwise_graph, odd_graph, tie_graph])
def test_sound_graphs_pass(build: Callable[[], IntegerGraph]) -> None:
    validate_graph(build())


def drop_value(name: str) -> Damage:
    return lambda graph: replace(graph, values={key: one for key, one in graph.values.items() if key != name})


def swap_first_two(graph: IntegerGraph) -> IntegerGraph:
    first, second, *others = graph.nodes
    return replace(graph, nodes=(second, first, *others))


def with_element(position: int, element: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed.flat[position] = element
        return changed

    return change


WIDE = np.zeros(8, np.int64)
DAMAGES: dict[str, tuple[Damage, str]] = {
    "mean out of reach": (
        value("pool", scale=float(np.float32(1e-9))),
        "onnxruntime takes 2^-32 to 256. The training diverged there",
    ),
    "no nodes": (lambda graph: replace(graph, nodes=()), "residual-w4a4: the graph has no nodes"),
    "output unknown": (drop_value("logits"), "logits is an end of the graph but not among its values"),
    "output never written": (
        lambda graph: replace(graph, nodes=graph.nodes[:-1]),
        "no node writes the graph's output logits",
    ),
    "pixels not uint8": (value("pixels", qmax=127, zero_point=3), "the input pixels has shape (3, 11, 9)"),
    "pixels float": (value("pixels", quantization=None), "the input pixels has shape (3, 11, 9) and None"),
    "pixels flat": (value("pixels", shape=(297,)), "uint8 pixels (C, H, W) with a quantization of qmax 255 are due"),
    "logits quantized": (
        lambda graph: value("logits", quantization=graph.values["stem"].quantization)(graph),
        "the output logits is quantized; the logits must be float",
    ),
    "name differs": (value("stem", name="root"), "value 'root' is filed under 'stem'"),
    "empty dimension": (value("stem", shape=(8, 0, 9)), "value stem: shape (8, 0, 9); every dimension must be"),
    "scale zero": (value("stem", scale=0.0), "value stem: scale is 0.0; it must be finite, positive"),
    "scale negative": (value("stem", scale=-0.5), "value stem: scale is -0.5"),
    "scale infinite": (value("stem", scale=float("inf")), "value stem: scale is inf"),
    "scale nan": (value("stem", scale=float("nan")), "value stem: scale is nan"),
    "scale denormal": (value("stem", scale=1e-45), "it must be finite, positive and a normal float32"),
    "scale not a float32": (value("stem", scale=0.1), "value stem: scale 0.1 is not a float32; round it"),
    "qmax": (value("stem", qmax=100), "value stem: qmax is 100; it must be 2^bits - 1"),
    "zero point": (value("stem", zero_point=256), "value stem: zero_point is 256, outside its codes 0..255"),
    "zero point negative": (value("stem", zero_point=-1), "value stem: zero_point is -1"),
    "node twice": (node("block1.conv2", name="block1.conv1"), "Conv block1.conv1: the name is used by two nodes"),
    "unknown input": (node("block1.conv1", input="lost"), "Conv block1.conv1: uses lost, which is not among"),
    "order": (swap_first_two, "MaxPool maxpool: reads stem before any node writes it"),
    "reads logits": (node("hidden", input="logits"), "Gemm hidden: reads logits before any node writes it"),
    "no output": (node("block1.add", outputs=()), "Add block1.add: has no output"),
    "written twice": (node("block1.conv2", output="block1.conv1"), "Conv block1.conv2: writes block1.conv1, which is"),
    "same output twice": (node("block1.add", outputs=("block1.add/act",) * 2), "Add block1.add: writes block1.add/act"),
    "float inside": (value("stem", quantization=None), "Conv stem: writes stem without a quantization; onnxruntime"),
    "qmin": (value("stem", qmin=3), "value stem: qmin is 3; 0 or, after a ReLU, the zero_point is due"),
    "add too far": (
        value("block2.add/act", scale=float(np.float32(1e-9))),
        "Add block2.add: input scale / output scale is",
    ),
    "add shapes": (node("block2.add", inputs=("block2.conv2", "pixels")), "adds block2.conv2 (11, 3, 3) and pixels"),
    "shape": (
        value("stem", shape=(8, 11, 8)),
        "Conv stem: writes stem of shape (8, 11, 8); its inputs make (8, 11, 9)",
    ),
    "gemm on an image": (node("hidden", input="pool"), "Gemm hidden: weight codes have shape (13, 11) and the value"),
    "conv on a row": (node("block2.conv1", input="flatten"), "reads flatten before any node writes it"),
    "groups": (node("block1.conv1", groups=2), "reads maxpool with 8 channels in 2 groups; its weight (8, 8, 3, 3)"),
    "stride": (node("block1.conv1", stride=(0, 1)), "Conv block1.conv1: kernel (3, 3), stride (0, 1), dilation (1, 1)"),
    "kernel": (node("maxpool", kernel=(0, 2)), "MaxPool maxpool: kernel (0, 2), stride (2, 2)"),
    "padding": (node("maxpool", padding=(1, 1, 0, -1)), "paddings at 0"),
    "max pool of padding": (
        node("maxpool", padding=(3, 0, 0, 1), kernel=(3, 2)),
        "MaxPool maxpool: pads by (3, 0, 0, 1) for windows of (3, 2); each side must be below the window's size",
    ),
    "kernel too large": (node("block1.conv1", dilation=(9, 1)), "a window of 19 does not fit the padded input of 8"),
    "codes type": (weight("stem", codes=lambda codes: codes.astype(np.int16)), "Conv stem: has int16 weight codes"),
    "codes rank": (weight("stem", codes=lambda codes: codes[0]), "Conv stem: weight codes have shape (3, 3, 3)"),
    "bits": (weight("stem", bits=9), "Conv stem: has 9-bit weights; packed export needs 1, 2, 3, 4 or 8"),
    "codes range": (
        weight("block1.conv1", codes=with_element(5, 8)),
        "Conv block1.conv1: has weight codes -8..8; 4 bits hold -8..7",
    ),
    "storage": (
        weight("stem", storage="int5"),
        "Conv stem: stores its weight as 'int5'; one of int8, int4, int2, table",
    ),
    "packed bits": (weight("stem", storage="int8", packed_bits=4), "packs its weight at 4 bits, which int8 storage"),
    "packed narrower": (
        weight("stem", storage="int4", packed_bits=4),
        "Conv stem: packs 8-bit weights at 4 bits, which would change them",
    ),
    "weight scale zero": (
        weight("stem", scale=with_element(3, 0.0)),
        "Conv stem: output channel 3 has weight scale 0.0; it must be finite, positive",
    ),
    "weight scale nan": (weight("hidden", scale=with_element(12, np.nan)), "Gemm hidden: output channel 12 has weight"),
    "weight scales too few": (
        weight("stem", scale=lambda scale: scale[:1]),
        "has weight scales float32 (1,); float32 (8",
    ),
    "weight scales double": (weight("stem", scale=lambda scale: scale.astype(float)), "has weight scales float64"),
    "product vanishes": (
        weight("stem", scale=with_element(0, 2e-38)),
        "Conv stem: output channel 0 has input scale times weight scale",
    ),
    "bias type": (node("stem", bias=WIDE), "Conv stem: has a bias int64 (8,); int32 (8,) is due"),
    "bias length": (node("stem", bias=WIDE[:1].astype(np.int32)), "Conv stem: has a bias int32 (1,)"),
    "accumulator": (
        node("stem", bias=np.full(8, 2**31 - 1, np.int32)),
        "beyond an int32 accumulator",
    ),
    "max pool requantizes": (
        value("maxpool", scale=1.0),
        "MaxPool maxpool: moves codes from stem to maxpool; their quantizations must be equal",
    ),
    "flatten requantizes": (value("flatten", qmax=127), "Flatten flatten: moves codes from pool to flatten"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_rule_is_named(damage: str) -> None:
    change, message = DAMAGES[damage]
    with pytest.raises(ExportError, match=re.escape(message)):
        validate_graph(change(residual_graph()))


def test_a_float_value_may_not_be_read() -> None:
    graph = residual_graph()
    classifier = graph.nodes[-1]
    again = replace(classifier, name="again", input="logits", output="more")
    values = {**graph.values, "more": Value(name="more", shape=(10,), quantization=graph.values["hidden"].quantization)}
    with pytest.raises(ExportError, match="Gemm again: reads logits, which is float"):
        validate_graph(replace(graph, nodes=(*graph.nodes, again), values=values))


def test_graphs_cannot_be_changed_in_place() -> None:
    graph = residual_graph()
    with pytest.raises(TypeError):
        graph.values["stem"] = graph.values["pixels"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        graph.name = "other"  # type: ignore[misc]
