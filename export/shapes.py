"""Output shapes of nodes, without the batch dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mecdeploy.export.errors import ExportError
from mecdeploy.export.graph import Add, Conv, Flatten, Gemm, GlobalAveragePool, MaxPool, Node

Shape = tuple[int, ...]


def output_shape(node: Node, shape: Shape) -> Shape:
    """Shape of every output of `node` for a first input of `shape`. Raises ExportError where the input does not fit."""
    if isinstance(node, Conv | MaxPool | GlobalAveragePool) and len(shape) != 3:
        raise ExportError(f"{type(node).__name__} {node.name}: reads a value of shape {shape}; (C, H, W) is due.")
    return SHAPES[type(node)](node, shape)


def _conv(node: Conv, shape: Shape) -> Shape:
    if node.weight.codes.ndim != 4:
        raise ExportError(
            f"Conv {node.name}: weight codes have shape {node.weight.codes.shape}; (O, I / groups, kh, kw) is due."
        )
    out_channels, _, *kernel = node.weight.codes.shape
    return (out_channels, *_windows(node, shape, (kernel[0], kernel[1]), ceil_mode=False))


def _gemm(node: Gemm, shape: Shape) -> Shape:
    if len(shape) != 1 or node.weight.codes.ndim != 2 or node.weight.codes.shape[1] != shape[0]:
        raise ExportError(
            f"Gemm {node.name}: weight codes have shape {node.weight.codes.shape} and the value it reads {shape}; "
            "(O, I) and (I,) are due."
        )
    return (node.weight.codes.shape[0],)


def _max_pool(node: MaxPool, shape: Shape) -> Shape:
    return (shape[0], *_windows(node, shape, node.kernel, ceil_mode=node.ceil_mode))


def _windows(node: Conv | MaxPool, shape: Shape, kernel: tuple[int, int], *, ceil_mode: bool) -> tuple[int, int]:
    """Positions of a sliding window over height and width."""
    top, left, bottom, right = node.padding
    if min(*kernel, *node.stride, *node.dilation) < 1 or min(node.padding) < 0:
        raise ExportError(
            f"{type(node).__name__} {node.name}: kernel {kernel}, stride {node.stride}, dilation {node.dilation}, "
            f"padding {node.padding}; kernels, strides and dilations start at 1, paddings at 0."
        )
    sizes = []
    for axis, pads in enumerate(((top, bottom), (left, right))):
        size, stride = shape[1 + axis], node.stride[axis]
        span = node.dilation[axis] * (kernel[axis] - 1) + 1
        room = size + sum(pads) - span
        if room < 0:
            raise ExportError(
                f"{type(node).__name__} {node.name}: a window of {span} does not fit the padded input of "
                f"{size + sum(pads)}; feed larger images or use a smaller kernel."
            )
        steps = math.ceil(room / stride) if ceil_mode else room // stride
        # a window that would start in the far padding is dropped, as PyTorch and onnxruntime do
        if ceil_mode and steps * stride >= size + pads[0]:
            steps -= 1
        sizes.append(steps + 1)
    return sizes[0], sizes[1]


SHAPES: dict[type[Any], Callable[[Any, Shape], Shape]] = {
    Conv: _conv,
    Gemm: _gemm,
    Add: lambda node, shape: shape,
    MaxPool: _max_pool,
    GlobalAveragePool: lambda node, shape: (shape[0], 1, 1),
    Flatten: lambda node, shape: (math.prod(shape),),
}
