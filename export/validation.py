"""The rules an IntegerGraph obeys. Checked where a graph enters the compiler and after every pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import numpy as np

from mecdeploy.export.errors import ExportError
from mecdeploy.export.graph import (
    Add,
    Conv,
    Flatten,
    Gemm,
    GlobalAveragePool,
    IntegerGraph,
    MaxPool,
    Node,
    Quantization,
    Value,
    Weight,
    inputs_of,
    outputs_of,
)
from mecdeploy.export.shapes import output_shape

NodeT = TypeVar("NodeT", bound=Node)
MEAN_MULTIPLIERS = (2.0**-32, 256.0)
TRAINED_BITS = (2, 3, 4, 8)
STORAGE_BITS = {"": (0, 2, 3, 4, 8), "int8": (8,), "int4": (4,), "int2": (2,), "table": (2, 3, 4)}
"""Weight storage -> the packed widths it can hold."""


def validate_graph(graph: IntegerGraph) -> None:
    """Raise ExportError, naming the node and the value, unless integer kernels can run the graph as it stands."""
    _check_ends(graph)
    for key, value in graph.values.items():
        _check_value(key, value)
    written = {graph.input}
    names: set[str] = set()
    for node in graph.nodes:
        if node.name in names:
            _refuse(node, "the name is used by two nodes; rename one")
        names.add(node.name)
        _check_wiring(node, graph, written)
        written.update(outputs_of(node))
        RULES[type(node)](node, graph)
    if graph.output not in written:
        raise ExportError(f"{graph.name}: no node writes the graph's output {graph.output}.")


def _check_ends(graph: IntegerGraph) -> None:
    if not graph.nodes:
        raise ExportError(f"{graph.name}: the graph has no nodes; there is nothing to export.")
    for end in (graph.input, graph.output):
        if end not in graph.values:
            raise ExportError(f"{graph.name}: {end} is an end of the graph but not among its values.")
    pixels = graph.values[graph.input]
    if pixels.quantization is None or pixels.quantization.qmax != 255 or len(pixels.shape) != 3:
        raise ExportError(
            f"{graph.name}: the input {graph.input} has shape {pixels.shape} and {pixels.quantization}; "
            "uint8 pixels (C, H, W) with a quantization of qmax 255 are due."
        )
    if graph.values[graph.output].quantization is not None:
        raise ExportError(f"{graph.name}: the output {graph.output} is quantized; the logits must be float.")


def _check_value(key: str, value: Value) -> None:
    if key != value.name or not key:
        raise ExportError(f"value {value.name!r} is filed under {key!r}; use its name.")
    if not value.shape or any(size < 1 for size in value.shape):
        raise ExportError(f"value {key}: shape {value.shape}; every dimension must be at least 1.")
    if value.quantization is not None:
        _check_quantization(key, value.quantization)


def _check_quantization(name: str, quantization: Quantization) -> None:
    scale, zero_point, qmax = quantization.scale, quantization.zero_point, quantization.qmax
    if not (math.isfinite(scale) and scale >= np.finfo(np.float32).tiny):
        raise ExportError(f"value {name}: scale is {scale}; it must be finite, positive and a normal float32.")
    if float(np.float32(scale)) != scale:
        raise ExportError(f"value {name}: scale {scale!r} is not a float32; round it where it is learned.")
    if qmax not in {(1 << bits) - 1 for bits in range(1, 9)}:
        raise ExportError(f"value {name}: qmax is {qmax}; it must be 2^bits - 1, for 1 to 8 bits.")
    if not 0 <= zero_point <= qmax:
        raise ExportError(f"value {name}: zero_point is {zero_point}, outside its codes 0..{qmax}.")


def _check_wiring(node: Node, graph: IntegerGraph, written: set[str]) -> None:
    """Every input is written before it is read, every output is written once, and shapes agree."""
    for name in (*inputs_of(node), *outputs_of(node)):
        if name not in graph.values:
            _refuse(node, f"uses {name}, which is not among the graph's values")
    for name in inputs_of(node):
        if name not in written:
            _refuse(node, f"reads {name} before any node writes it")
        if graph.values[name].quantization is None:
            _refuse(node, f"reads {name}, which is float; only the graph's output may be")
    if not outputs_of(node):
        _refuse(node, "has no output")
    for position, name in enumerate(outputs_of(node)):
        if name in written or name in outputs_of(node)[:position]:
            _refuse(node, f"writes {name}, which is written already")
        value = graph.values[name]
        if value.quantization is None and not (name == graph.output and isinstance(node, Gemm)):
            _refuse(node, f"writes {name} without a quantization; onnxruntime would run it in float")
    if isinstance(node, Add):
        left, right = (graph.values[name].shape for name in node.inputs)
        if left != right:
            _refuse(node, f"adds {node.inputs[0]} {left} and {node.inputs[1]} {right}; the shapes must be equal")
    expected = output_shape(node, graph.values[inputs_of(node)[0]].shape)
    for name in outputs_of(node):
        if graph.values[name].shape != expected:
            _refuse(node, f"writes {name} of shape {graph.values[name].shape}; its inputs make {expected}")


def _check_conv(node: Conv, graph: IntegerGraph) -> None:
    channels = graph.values[node.input].shape[0]
    out_channels, per_group = node.weight.codes.shape[:2]
    if node.groups < 1 or channels != per_group * node.groups or out_channels % node.groups:
        _refuse(
            node,
            f"reads {node.input} with {channels} channels in {node.groups} groups; "
            f"its weight {node.weight.codes.shape} does not fit",
        )
    _check_weight(node, graph)


def _check_gemm(node: Gemm, graph: IntegerGraph) -> None:
    _check_weight(node, graph)


def _check_weight(node: Conv | Gemm, graph: IntegerGraph) -> None:
    weight, out_channels = node.weight, node.weight.codes.shape[0]
    if weight.codes.dtype != np.int8:
        _refuse(node, f"has {weight.codes.dtype} weight codes; they must be int8")
    if weight.bits not in TRAINED_BITS:
        _refuse(node, f"has {weight.bits}-bit weights; packed export needs 2, 3, 4 or 8")
    low, high = -(1 << (weight.bits - 1)), (1 << (weight.bits - 1)) - 1
    smallest, largest = int(weight.codes.min()), int(weight.codes.max())
    if smallest < low or largest > high:
        _refuse(node, f"has weight codes {smallest}..{largest}; {weight.bits} bits hold {low}..{high}")
    _check_storage(node, weight)
    if weight.scale.dtype != np.float32 or weight.scale.shape != (out_channels,):
        _refuse(node, f"has weight scales {weight.scale.dtype} {weight.scale.shape}; float32 ({out_channels},) is due")
    if node.bias.dtype != np.int32 or node.bias.shape != (out_channels,):
        _refuse(node, f"has a bias {node.bias.dtype} {node.bias.shape}; int32 ({out_channels},) is due")
    _check_scales(node, graph)
    _check_accumulator(node, graph)


def _check_storage(node: Conv | Gemm, weight: Weight) -> None:
    if weight.storage not in STORAGE_BITS:
        _refuse(node, f"stores its weight as {weight.storage!r}; one of int8, int4, int2, table is due")
    if weight.packed_bits not in STORAGE_BITS[weight.storage]:
        _refuse(node, f"packs its weight at {weight.packed_bits} bits, which {weight.storage or 'no'} storage holds")
    if 0 < weight.packed_bits < weight.bits:
        _refuse(node, f"packs {weight.bits}-bit weights at {weight.packed_bits} bits, which would change them")


def _check_scales(node: Conv | Gemm, graph: IntegerGraph) -> None:
    """The product of input and weight scale is the bias's scale: it must not vanish in float32."""
    quantization = graph.values[node.input].quantization
    assert quantization is not None  # _check_wiring refused a float input
    with np.errstate(all="ignore"):
        product = np.float32(quantization.scale) * node.weight.scale
    for what, scales in (("weight scale", node.weight.scale), ("input scale times weight scale", product)):
        bad = ~(np.isfinite(scales) & (scales >= np.finfo(np.float32).tiny))
        if bad.any():
            channel = int(bad.argmax())
            _refuse(
                node,
                f"output channel {channel} has {what} {scales[channel]}; "
                "it must be finite, positive and a normal float32",
            )


def _check_accumulator(node: Conv | Gemm, graph: IntegerGraph) -> None:
    """No input can overflow the int32 accumulator."""
    quantization = graph.values[node.input].quantization
    assert quantization is not None  # _check_wiring refused a float input
    farthest = max(quantization.zero_point, quantization.qmax - quantization.zero_point)
    absolute = np.abs(node.weight.codes.reshape(node.bias.size, -1), dtype=np.int16)
    sums = absolute.sum(axis=1, dtype=np.int64) * farthest + np.abs(node.bias.astype(np.int64))
    if int(sums.max()) > np.iinfo(np.int32).max:
        _refuse(node, f"output channel {int(sums.argmax())} can reach {int(sums.max())}, beyond an int32 accumulator")


def _check_unchanged(node: MaxPool | Flatten, graph: IntegerGraph) -> None:
    if graph.values[node.input].quantization != graph.values[node.output].quantization:
        _refuse(node, f"moves codes from {node.input} to {node.output}; their quantizations must be equal")


def _check_nothing_more(node: Add, graph: IntegerGraph) -> None:
    """Adds have no rule beyond wiring and shape."""


def _check_mean(node: GlobalAveragePool, graph: IntegerGraph) -> None:
    """Onnxruntime's kernel refuses other multipliers, and only when it runs."""
    read, written = graph.values[node.input], graph.values[node.output]
    assert read.quantization is not None and written.quantization is not None  # wiring was checked before
    positions = read.shape[1] * read.shape[2]
    multiplier = read.quantization.scale / (written.quantization.scale * positions)
    if not MEAN_MULTIPLIERS[0] <= multiplier < MEAN_MULTIPLIERS[1]:
        _refuse(
            node,
            f"input scale / (output scale * {positions} positions) is {multiplier:.3g}; "
            "onnxruntime takes 2^-32 to 256. The training diverged there: train again with a lower learning rate",
        )


RULES: dict[type[Any], Callable[[Any, IntegerGraph], None]] = {
    Conv: _check_conv,
    Gemm: _check_gemm,
    Add: _check_nothing_more,
    MaxPool: _check_unchanged,
    GlobalAveragePool: _check_mean,
    Flatten: _check_unchanged,
}


def _refuse(node: Node, problem: str) -> NoReturn:
    raise ExportError(f"{type(node).__name__} {node.name}: {problem}.")
