"""Why onnxruntime keeps a layer in float, as far as its weight and bias go; reasons.py has the rest."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from mecdeploy.runtime_checks.inspection_report import Reason
from mecdeploy.runtime_checks.layers import OPERANDS, find_weight, known, value, weight_index, written_by
from mecdeploy.runtime_checks.patterns import Graph, attributes_of

BIAS_TOLERANCE = 0.01
"""By how much of itself a bias scale may be off input scale times weight scale, in onnxruntime 1.32."""


def weight(graph: Graph, node: onnx.NodeProto) -> Iterator[Reason]:
    """It has to be 8 bits through a DequantizeLinear, with one scale or one for each output channel."""
    index = weight_index(graph, node)
    found = find_weight(graph, node, index) if index is not None else None
    if index is None or found is None:
        return
    tensor, dequantize = found.constant.source, found.dequantize
    if dequantize is None:
        what = f"its weight {tensor} is {found.constant.value.dtype}, without a DequantizeLinear"
        yield Reason(kind="float-weight", what=what)
        return
    if found.constant.storage in ("int4", "int2", "uint4", "uint2") and dequantize.input[0] == tensor:
        yield Reason(
            kind="packed-weight",
            what=f"its weight {tensor} goes into DequantizeLinear as {found.constant.storage}; integer kernels take "
            "int8, which a Cast before it makes",
        )
    elif found.constant.value.dtype not in (np.int8, np.uint8):
        what = f"its weight {tensor} is stored as {found.constant.value.dtype}; integer kernels take 8 bits"
        yield Reason(kind="weight-type", what=what)
    if found.block:
        yield Reason(kind="weight-blocks", what=f"its weight {tensor} has a scale for every {found.block} values")


def layout(graph: Graph, node: onnx.NodeProto) -> Iterator[Reason]:
    """What its scales and a Gemm's attributes must not be. onnxruntime 1.32 checks a Gemm's, but no Conv's."""
    index = weight_index(graph, node)
    found = find_weight(graph, node, index) if index is not None else None
    if index is None or found is None or found.dequantize is None or node.op_type not in ("Conv", "Gemm"):
        return
    tensor, attributes = found.constant.source, attributes_of(node)
    changed = [f"{name} is {attributes[name]:g}" for name in ("alpha", "beta") if attributes.get(name, 1.0) != 1.0]
    if node.op_type == "Gemm" and (len(found.dequantize.input) < 3 or not found.dequantize.input[2]):
        what = f"the DequantizeLinear of its weight {tensor} has no zero point, which a Gemm needs even where it is 0"
        yield Reason(kind="weight-zero-point", what=what)
    if changed and len(node.input) > 2:
        yield Reason(kind="gemm-attributes", what=f"it has a bias, and {', '.join(changed)} instead of 1")
    outputs = 0 if node.op_type == "Conv" or attributes.get("transB", 0) else 1
    if found.axis is not None and not found.block and graph.producers.get(node.input[index]) is found.dequantize:
        axis = found.axis % found.constant.value.ndim
        if axis != outputs:
            what = f"the scales of its weight {tensor} lie along axis {axis}, its outputs along axis {outputs}"
            yield Reason(kind="weight-axis", what=what)


def bias(graph: Graph, node: onnx.NodeProto) -> Iterator[Reason]:
    """It has to be a constant: int32 through a DequantizeLinear, or float, which onnxruntime quantises itself."""
    index = _bias_index(node)
    if index is None:
        return
    dequantize = graph.producers.get(node.input[index])
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        if known(graph, node.input[index]) is None:
            yield Reason(
                kind="computed-bias",
                what=f"its bias {node.input[index]} is computed: {written_by(graph, node.input[index])}",
            )
        return
    stored = known(graph, dequantize.input[0])
    if stored is not None and stored.value.dtype != np.int32:
        what = f"its bias {dequantize.input[0]} is stored as {stored.value.dtype}; integer kernels take int32"
        yield Reason(kind="bias-type", what=what)


def bias_scale(graph: Graph, node: onnx.NodeProto) -> Iterator[Reason]:
    """An int32 bias is added to products of integers: it has to be in their steps. onnxruntime checks a Conv's."""
    index = _bias_index(node)
    dequantize = graph.producers.get(node.input[index]) if index is not None else None
    weight, source = find_weight(graph, node, 1), graph.producers.get(node.input[0])
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or weight is None or weight.scale is None:
        return
    input_scale = value(graph, source.input, 1) if source is not None and source.op_type == "DequantizeLinear" else None
    scale = value(graph, dequantize.input, 1)
    if scale is None or input_scale is None or input_scale.size != 1 or weight.block:
        return
    expected = input_scale.astype(np.float64).reshape(-1) * weight.scale.astype(np.float64).reshape(-1)
    given = scale.astype(np.float64).reshape(-1)
    off = given.size > 1 and expected.size > 1 and given.size != expected.size
    if off or not np.allclose(given, expected, rtol=BIAS_TOLERANCE, atol=0):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = "" if off else f" (up to {np.max(np.maximum(given / expected, expected / given)):.3g} times off)"
        what = f"the scale of its bias {dequantize.input[0]} is not input scale times weight scale{ratio}"
        yield Reason(kind="bias-scale", what=what)


def _bias_index(node: onnx.NodeProto) -> int | None:
    index = OPERANDS[node.op_type].bias if node.op_type in OPERANDS else None
    return index if index is not None and index < len(node.input) and node.input[index] else None
