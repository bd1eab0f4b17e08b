"""Output shapes of nodes, without the batch dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

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
    MaxPool,
    Node,
    Quantize,
    Reshape,
    Slice,
    Transpose,
)
from mecdeploy.export.refusal import refuse

Shape = tuple[int, ...]


def output_shape(node: Node, shapes: Sequence[Shape]) -> Shape | None:
    """Shape of every output of `node` for inputs of `shapes`; None where only the node's author knows it.

    A Reshape and a FloatIsland say their shapes through their values. Raises ExportError where the inputs do not fit.
    """
    if isinstance(node, Conv | MaxPool | AveragePool | GlobalAveragePool) and len(shapes[0]) != 3:
        refuse(node, f"reads a value of shape {shapes[0]}; (C, H, W) is due")
    return SHAPES[type(node)](node, *shapes)


def _conv(node: Conv, shape: Shape) -> Shape:
    codes = node.weight.codes
    if codes.ndim != 4:
        refuse(node, f"weight codes have shape {codes.shape}; (O, I / groups, kh, kw) is due")
    out_channels, _, height, width = codes.shape
    return (out_channels, *_windows(node, shape, (height, width), node.dilation, ceil_mode=False))


def _gemm(node: Gemm, shape: Shape) -> Shape:
    codes = node.weight.codes
    if codes.ndim != 2 or codes.shape[1] != shape[-1]:
        refuse(
            node, f"weight codes have shape {codes.shape} and the value it reads {shape}; (O, I) and (..., I) are due"
        )
    return (*shape[:-1], codes.shape[0])


def _add(node: Add, left: Shape, right: Shape) -> Shape:
    if left != right:
        refuse(node, f"adds {node.inputs[0]} {left} and {node.inputs[1]} {right}; the shapes must be equal")
    return left


def _elementwise(node: Elementwise, *shapes: Shape) -> Shape:
    """Sizes broadcast, ranks do not: of two ranks the shorter would meet the other's batch with its own channels."""
    ranks = {len(shape) for shape in shapes}
    sizes = [set(axis) - {1} for axis in zip(*shapes, strict=False)]
    if len(ranks) != 1 or any(len(axis) > 1 for axis in sizes):
        listed = " and ".join(f"{name} {shape}" for name, shape in zip(node.inputs, shapes, strict=True))
        refuse(node, f"reads {listed}; shapes of one rank that broadcast are due")
    return tuple(axis.pop() if axis else 1 for axis in sizes)


def _max_pool(node: MaxPool, shape: Shape) -> Shape:
    return (shape[0], *_windows(node, shape, node.kernel, node.dilation, ceil_mode=node.ceil_mode))


def _average_pool(node: AveragePool, shape: Shape) -> Shape:
    return (shape[0], *_windows(node, shape, node.kernel, (1, 1), ceil_mode=False))


def _windows(
    node: Conv | MaxPool | AveragePool,
    shape: Shape,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    *,
    ceil_mode: bool,
) -> tuple[int, int]:
    """Positions of a sliding window over height and width."""
    top, left, bottom, right = node.padding
    if min(*kernel, *node.stride, *dilation) < 1 or min(node.padding) < 0:
        refuse(
            node,
            f"kernel {kernel}, stride {node.stride}, dilation {dilation}, padding {node.padding}; "
            "kernels, strides and dilations start at 1, paddings at 0",
        )
    sizes = []
    for axis, pads in enumerate(((top, bottom), (left, right))):
        size, stride = shape[1 + axis], node.stride[axis]
        span = dilation[axis] * (kernel[axis] - 1) + 1
        room = size + sum(pads) - span
        if room < 0:
            refuse(
                node,
                f"a window of {span} does not fit the padded input of {size + sum(pads)}; "
                "feed larger images or use a smaller kernel",
            )
        steps = math.ceil(room / stride) if ceil_mode else room // stride
        # a window that would start in the far padding is dropped, as PyTorch and onnxruntime do
        if ceil_mode and steps * stride >= size + pads[0]:
            steps -= 1
        sizes.append(steps + 1)
    return sizes[0], sizes[1]


def _concat(node: Concat, *shapes: Shape) -> Shape:
    along = node.axis - 1
    if not 0 <= along < min(map(len, shapes)) or len({(*one[:along], *one[along + 1 :]) for one in shapes}) != 1:
        listed = " and ".join(f"{name} {shape}" for name, shape in zip(node.inputs, shapes, strict=True))
        refuse(node, f"joins {listed} along axis {node.axis}; an axis from 1, equal sizes along all others, are due")
    return (*shapes[0][:along], sum(shape[along] for shape in shapes), *shapes[0][along + 1 :])


def _transpose(node: Transpose, shape: Shape) -> Shape:
    if node.permutation[:1] != (0,) or sorted(node.permutation) != list(range(1 + len(shape))):
        refuse(
            node,
            f"permutation {node.permutation} of a value of shape {shape}; "
            f"an order of 0..{len(shape)} that begins with the batch, 0, is due",
        )
    return tuple(shape[axis - 1] for axis in node.permutation[1:])


def _slice(node: Slice, shape: Shape) -> Shape:
    if not 1 <= node.axis <= len(shape):
        refuse(node, f"cuts axis {node.axis} of a value of shape {shape}; axes 1..{len(shape)} can be cut")
    along = node.axis - 1
    if not 0 <= node.start < node.stop <= shape[along] or node.step < 1:
        refuse(
            node,
            f"takes {node.start}:{node.stop}:{node.step} of {shape[along]} codes; "
            "0 <= start < stop <= size and a step from 1 are due",
        )
    return (*shape[:along], len(range(node.start, node.stop, node.step)), *shape[along + 1 :])


SHAPES: dict[type[Any], Callable[..., Shape | None]] = {
    Conv: _conv,
    Gemm: _gemm,
    Add: _add,
    Elementwise: _elementwise,
    MaxPool: _max_pool,
    AveragePool: _average_pool,
    GlobalAveragePool: lambda node, shape: (shape[0], 1, 1),
    Flatten: lambda node, shape: (math.prod(shape),),
    Reshape: lambda node, shape: None,
    Transpose: _transpose,
    Slice: _slice,
    Concat: _concat,
    FloatIsland: lambda node, *shapes: None,
    Quantize: lambda node, shape: shape,
    Dequantize: lambda node, shape: shape,
}
