"""How the activations that a layer of any ONNX graph reads and writes are quantised."""

from __future__ import annotations

import numpy as np
import onnx

from mecdeploy.runtime_checks.errors import CheckError
from mecdeploy.runtime_checks.inspection_report import Quantization
from mecdeploy.runtime_checks.layers import OPERANDS, Array, bits_of, ends, value, weight_index, whole_ends
from mecdeploy.runtime_checks.patterns import MOVING, Graph

ACTIVATIONS = ("Relu", "Clip")
"""What onnxruntime may drop before a QuantizeLinear, which clamps too."""


def dequantized_from(graph: Graph, tensor: str) -> Quantization | None:
    """How a float tensor is stored, if a DequantizeLinear writes it."""
    node = graph.producers.get(tensor)
    if node is None or node.op_type != "DequantizeLinear":
        return None
    return quantization(graph, node, node.input[0])


def quantization(graph: Graph, node: onnx.NodeProto, codes: str) -> Quantization:
    """Scale, zero point and bits of a QuantizeLinear or DequantizeLinear whose codes are the tensor `codes`."""
    return described(graph, codes, value(graph, node.input, 1), value(graph, node.input, 2))


def described(graph: Graph, codes: str, scale: Array | None, zero_point: Array | None) -> Quantization:
    """How activations are stored whose codes, scale and zero point are these; without a zero point as uint8."""
    kind = np.dtype(np.uint8) if zero_point is None or zero_point.dtype.kind not in "iu" else zero_point.dtype
    limits = np.iinfo(kind)
    try:
        low, high = graph.code_range(codes, (int(limits.min), int(limits.max)))
    except CheckError:  # a Clip whose bounds are computed
        low, high = int(limits.min), int(limits.max)
    return Quantization(
        dtype=str(kind),
        bits=bits_of(low, high),
        scales=1 if scale is None else scale.size,
        scale=ends(scale),
        zero_point=whole_ends(zero_point) if zero_point is not None else None if scale is None else (0, 0),
    )


def quantized_by(graph: Graph, tensor: str) -> onnx.NodeProto | None:
    """The QuantizeLinear that a float tensor goes to, through an activation or what only moves it, if it does."""
    readers = graph.consumers.get(tensor, [])
    while len(readers) == 1 and readers[0].op_type in (*ACTIVATIONS, *MOVING, "Identity"):
        readers = graph.consumers.get(readers[0].output[0], [])
    return next((reader for reader in readers if reader.op_type == "QuantizeLinear"), None)


def input_of(graph: Graph, node: onnx.NodeProto) -> Quantization | None:
    """How what a layer multiplies its weights with is stored; None where it is float."""
    operands = OPERANDS[node.op_type]
    data = operands.data
    if operands.weight == 1 and weight_index(graph, node) == 0:
        data = 1
    if operands.scales is None or operands.scales[0] < 0:
        writer = graph.producers.get(node.input[data])
        if writer is not None and writer.op_type == "DynamicQuantizeLinear":
            return described(graph, node.input[data], None, None)
        return dequantized_from(graph, node.input[data])
    assert operands.zero_points is not None
    zero_point = value(graph, node.input, operands.zero_points[0])
    return described(graph, node.input[data], value(graph, node.input, operands.scales[0]), zero_point)


def output_of(graph: Graph, node: onnx.NodeProto) -> Quantization | None:
    """How what a layer computes is stored; None where it stays float."""
    operands = OPERANDS[node.op_type]
    if operands.scales is not None and operands.scales[2] >= 0:
        scale = value(graph, node.input, operands.scales[2])
        if scale is not None:
            assert operands.zero_points is not None
            return described(graph, node.output[0], scale, value(graph, node.input, operands.zero_points[2]))
    quantize = quantized_by(graph, node.output[0])
    if quantize is None:
        return None
    codes = quantize.output[0]
    readers = graph.consumers.get(codes, [])
    clips = [reader for reader in readers if reader.op_type == "Clip"]
    return quantization(graph, quantize, clips[0].output[0] if len(clips) == len(readers) == 1 else codes)
