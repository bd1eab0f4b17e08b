"""Operators that only move codes: they run on uint8 as it is, without a DequantizeLinear before or a Q behind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mecdeploy.export.emission.builder import GraphBuilder
from mecdeploy.export.graph import Concat, Flatten, MaxPool, Reshape, Slice, Transpose


def emit_max_pool(builder: GraphBuilder, node: MaxPool) -> None:
    """MaxPool on the codes: order is all it needs, and codes keep it."""
    assert not node.ceil_mode  # the passes have written it out
    builder.node(
        "MaxPool",
        [node.input],
        node.output,
        kernel_shape=node.kernel,
        strides=node.stride,
        pads=node.padding,
        dilations=node.dilation,
    )


def emit_flatten(builder: GraphBuilder, node: Flatten) -> None:
    """Flatten on the codes, so that the Gemm behind it has a DequantizeLinear directly before it."""
    builder.node("Flatten", [node.input], node.output, axis=1)


def emit_reshape(builder: GraphBuilder, node: Reshape) -> None:
    """Reshape to the output's shape, the batch left open."""
    reshape(builder, node.input, node.output, builder.values[node.output].shape)


def emit_transpose(builder: GraphBuilder, node: Transpose) -> None:
    """Transpose, the batch staying first."""
    builder.node("Transpose", [node.input], node.output, perm=node.permutation)


def emit_slice(builder: GraphBuilder, node: Slice) -> None:
    """Slice of one axis."""
    numbers = (node.start, node.stop, node.axis, node.step)
    builder.node("Slice", [node.input, *(_integers(builder, (number,)) for number in numbers)], node.output)


def emit_concat(builder: GraphBuilder, node: Concat) -> None:
    """Concat of codes that all mean the same: one scale and one zero point."""
    builder.node("Concat", node.inputs, node.output, axis=node.axis)


def reshape(builder: GraphBuilder, tensor: str, output: str, shape: Sequence[int], batch_axis: int = 0) -> str:
    """Write `output`: the tensor in `shape` with -1 at batch_axis: the batch, or rows of it, stays open. Returns it."""
    return builder.node("Reshape", [tensor, _integers(builder, (*shape[:batch_axis], -1, *shape[batch_axis:]))], output)


def _integers(builder: GraphBuilder, numbers: Sequence[int]) -> str:
    """An int64 constant named by its value: many nodes share the few there are."""
    return builder.shared(f"int64/{'x'.join(map(str, numbers))}", np.array(numbers, np.int64))
