"""Windows of pools and convolutions as the file writes them, and the average pools between DequantizeLinear and Q."""

from __future__ import annotations

import math
from types import MappingProxyType

import onnx

from mecdeploy.runtime_checks import arithmetic, kernels
from mecdeploy.runtime_checks.patterns import Graph, Quantized, attributes_of, fault
from mecdeploy.runtime_checks.steps import Array, Requantizing, Step


def window_of(node: onnx.NodeProto, kernel: tuple[int, int] | None = None) -> kernels.Window:
    """The node's window; kernel: of a convolution, whose weights say it."""
    attributes = attributes_of(node)
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b""):
        raise fault(node, "auto_pad is set; the pads must be written out")
    shape = kernel if kernel is not None else attributes["kernel_shape"]
    pads = attributes.get("pads", [0, 0, 0, 0])
    strides = attributes.get("strides", [1, 1])
    dilations = attributes.get("dilations", [1, 1])
    if len(shape) != 2 or len(pads) != 4:
        raise fault(node, "only two-dimensional windows are known")
    return kernels.Window(
        kernel=(int(shape[0]), int(shape[1])),
        strides=(int(strides[0]), int(strides[1])),
        pads=(int(pads[0]), int(pads[1]), int(pads[2]), int(pads[3])),
        dilations=(int(dilations[0]), int(dilations[1])),
        ceil_mode=bool(attributes.get("ceil_mode", 0)),
    )


def _global_average(graph: Graph, node: onnx.NodeProto, y: Quantized) -> Step:
    """QLinearGlobalAveragePool."""
    x = graph.dequantized(node, 0)
    return Step(y.tensor, (x.tensor,), lambda codes: _whole(codes, x, y))


def _average(graph: Graph, node: onnx.NodeProto, y: Quantized) -> Step:
    """QLinearAveragePool; a window that is the whole image, without pads, runs the global kernel."""
    x, window = graph.dequantized(node, 0), window_of(node)
    include_pad = bool(attributes_of(node).get("count_include_pad", 0))
    if window.ceil_mode:
        raise fault(node, "the integer interpreter has no arithmetic for ceil_mode")
    if window.dilations != (1, 1):
        raise fault(node, "onnxruntime's integer kernel has no dilations")

    def compute(codes: Array) -> Array:
        if codes.shape[2:] == window.kernel and not any(window.pads):
            return _whole(codes, x, y)
        return kernels.average_pool(codes, x.scale, x.zero_point, window, include_pad, y.scale, y.zero_point)

    return Step(y.tensor, (x.tensor,), compute)


def _whole(codes: Array, x: Quantized, y: Quantized) -> Array:
    multiplier = arithmetic.global_average_multiplier(x.scale, y.scale, math.prod(codes.shape[2:]))
    return arithmetic.requantize(kernels.global_sum(codes, x.zero_point), multiplier.reshape(1), y.zero_point)


POOLS: MappingProxyType[str, Requantizing] = MappingProxyType(
    {"GlobalAveragePool": _global_average, "AveragePool": _average}
)
