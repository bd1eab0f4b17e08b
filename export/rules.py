"""What each node type demands beyond wiring and shapes, and what onnxruntime's kernels would refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from onnx import TensorProto

from mecdeploy.export.emission.elementwise import ELEMENTWISE, LARGEST_SUM_RATIO, ratio_problem
from mecdeploy.export.graph import (
    Add,
    AveragePool,
    Concat,
    Conv,
    Dequantize,
    Elementwise,
    Flatten,
    FloatIsland,
    Gemm,
    GlobalAveragePool,
    IntegerGraph,
    MaxPool,
    Quantize,
    Reshape,
    Slice,
    Transpose,
)
from mecdeploy.export.refusal import quantization_of, refuse
from mecdeploy.export.weight_rules import check_conv, check_gemm

MEAN_MULTIPLIERS = (2.0**-32, 256.0)


def _check_nothing_more(node: Quantize | Dequantize, graph: IntegerGraph) -> None:
    """No rule beyond wiring and shape."""


def _check_padding(node: MaxPool | AveragePool) -> None:
    """Onnxruntime does not load others."""
    top, left, bottom, right = node.padding
    if max(top, bottom) >= node.kernel[0] or max(left, right) >= node.kernel[1]:
        refuse(node, f"pads by {node.padding} for windows of {node.kernel}; each side must be below the window's size")


def _check_unchanged(node: MaxPool | Flatten | Transpose | Slice | Reshape, graph: IntegerGraph) -> None:
    if graph.values[node.input].quantization != graph.values[node.output].quantization:
        refuse(node, f"moves codes from {node.input} to {node.output}; their quantizations must be equal")


def _check_max_pool(node: MaxPool, graph: IntegerGraph) -> None:
    _check_padding(node)
    _check_unchanged(node, graph)


def _check_reshape(node: Reshape, graph: IntegerGraph) -> None:
    read, written = graph.values[node.input].shape, graph.values[node.output].shape
    if math.prod(read) != math.prod(written):
        refuse(node, f"makes {written} of {node.input} {read}; both must hold as many codes")
    _check_unchanged(node, graph)


def _check_concat(node: Concat, graph: IntegerGraph) -> None:
    joined = quantization_of(graph, node.output)
    for name in node.inputs:
        one = quantization_of(graph, name)
        if (one.scale, one.zero_point) != (joined.scale, joined.zero_point):
            refuse(
                node,
                f"joins {name} with scale {one.scale} and zero_point {one.zero_point} to {node.output} with "
                f"{joined.scale} and {joined.zero_point}; codes side by side must mean the same",
            )
        if one.qmin < joined.qmin or one.qmax > joined.qmax:
            refuse(
                node,
                f"joins {name} with codes {one.qmin}..{one.qmax} to {node.output}, which holds "
                f"{joined.qmin}..{joined.qmax}; the output must hold the codes of every input",
            )


def _check_add(node: Add, graph: IntegerGraph) -> None:
    widest = max(quantization_of(graph, name).scale for name in node.inputs)
    for name in node.outputs:
        if problem := ratio_problem(widest, quantization_of(graph, name), LARGEST_SUM_RATIO):
            refuse(node, problem)


def _check_elementwise(node: Elementwise, graph: IntegerGraph) -> None:
    kind = ELEMENTWISE.get(node.kind)
    if kind is None:
        refuse(node, f"is of kind {node.kind!r}; one of {', '.join(ELEMENTWISE)} is due")
    if len(node.inputs) != kind.inputs:
        refuse(node, f"reads {len(node.inputs)} values; {node.kind} takes {kind.inputs}")
    inputs = [quantization_of(graph, name) for name in node.inputs]
    if problem := kind.problem(inputs, quantization_of(graph, node.output)):
        refuse(node, problem)


def _check_average_pool(node: AveragePool, graph: IntegerGraph) -> None:
    """A window as large as the image runs in the kernel of global means, and has its limits too."""
    _check_padding(node)
    read, written = quantization_of(graph, node.input), quantization_of(graph, node.output)
    if problem := ratio_problem(read.scale, written, LARGEST_SUM_RATIO):
        refuse(node, problem)
    if node.kernel == graph.values[node.input].shape[1:] and not any(node.padding):
        _check_mean(node, graph)


def _check_mean(node: GlobalAveragePool | AveragePool, graph: IntegerGraph) -> None:
    """Onnxruntime's kernel refuses other multipliers, and only when it runs."""
    read, written = quantization_of(graph, node.input), quantization_of(graph, node.output)
    positions = math.prod(graph.values[node.input].shape[1:])
    multiplier = read.scale / (written.scale * positions)
    if not MEAN_MULTIPLIERS[0] <= multiplier < MEAN_MULTIPLIERS[1]:
        refuse(
            node,
            f"input scale / (output scale * {positions} positions) is {multiplier:.3g}; "
            "onnxruntime takes 2^-32 to 256. The training diverged there: train again with a lower learning rate",
        )


def _check_island(node: FloatIsland, graph: IntegerGraph) -> None:
    """The piece of ONNX stands for what the node says, and needs nothing but itself."""
    for what, names, entries in (
        ("inputs", node.inputs, node.graph.input),
        ("outputs", node.outputs, node.graph.output),
    ):
        if len(names) != len(entries):
            refuse(node, f"names {len(names)} {what}; its graph has {len(entries)}")
    for name, entry in zip(node.inputs, node.graph.input, strict=True):
        element = entry.type.tensor_type.elem_type
        is_codes = element == TensorProto.UINT8 and graph.values[name].quantization is not None
        if element != TensorProto.FLOAT and not is_codes:
            refuse(node, f"reads {name} as {_element_name(element)}; FLOAT, or UINT8 for codes, is due")
    for name, entry in zip(node.outputs, node.graph.output, strict=True):
        element = entry.type.tensor_type.elem_type
        if element != TensorProto.FLOAT:
            refuse(node, f"writes {name} as {_element_name(element)}; FLOAT is due")
    foreign = sorted(
        {f"{inner.domain}.{inner.op_type}" for inner in node.graph.node if inner.domain not in ("", "ai.onnx")}
    )
    if foreign:
        refuse(node, f"holds {', '.join(foreign)}; only ONNX's own operators run everywhere")
    _check_island_is_whole(node)
    outside = [tensor.name for tensor in node.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    if outside:
        refuse(node, f"keeps {outside[0]} in another file; load it into its graph first")


def _check_island_is_whole(node: FloatIsland) -> None:
    """Every tensor is written before it is read, by the island's own inputs, constants and nodes."""
    written = {entry.name for entry in (*node.graph.input, *node.graph.initializer)} | {""}
    for inner in node.graph.node:
        for name in inner.input:
            if name not in written:
                refuse(node, f"its {inner.op_type} reads {name}, which nothing in its graph writes before it")
        written.update(inner.output)
    for entry in node.graph.output:
        if entry.name not in written:
            refuse(node, f"its output {entry.name} is written by nothing in its graph")


def _element_name(element: int) -> str:
    return str(TensorProto.DataType.Name(element))


RULES: dict[type[Any], Callable[[Any, IntegerGraph], None]] = {
    Conv: check_conv,
    Gemm: check_gemm,
    Add: _check_add,
    Elementwise: _check_elementwise,
    MaxPool: _check_max_pool,
    AveragePool: _check_average_pool,
    GlobalAveragePool: _check_mean,
    Flatten: _check_unchanged,
    Reshape: _check_reshape,
    Transpose: _check_unchanged,
    Slice: _check_unchanged,
    Concat: _check_concat,
    FloatIsland: _check_island,
    Quantize: _check_nothing_more,
    Dequantize: _check_nothing_more,
}
