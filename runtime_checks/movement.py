"""Operators that move, select or compare stored codes without touching their scale: one small function an op type.

They run on the uint8 tensors as they are. The batch stays the first axis, and is never cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import onnx

from mecdeploy.runtime_checks import kernels
from mecdeploy.runtime_checks.patterns import Graph, attributes_of, fault
from mecdeploy.runtime_checks.pooling import window_of
from mecdeploy.runtime_checks.steps import Array, Step

Moving: TypeAlias = Callable[[Graph, onnx.NodeProto], Callable[..., Array]]


def _clip(graph: Graph, node: onnx.NodeProto) -> Callable[..., Array]:
    """Codes held at qmin and qmax."""
    low, high = _limit(graph, node, 1, 0), _limit(graph, node, 2, 255)
    return lambda codes: np.clip(codes, low, high)


def _max_pool(graph: Graph, node: onnx.NodeProto) -> Callable[..., Array]:
    window = window_of(node)
    return lambda codes: kernels.max_pool(codes, window)


def _flatten(graph: Graph, node: onnx.NodeProto) -> Callable[..., Array]:
    axis = int(attributes_of(node).get("axis", 1))
    return lambda codes: codes.reshape(math.prod(codes.shape[:axis]), -1)


def _reshape(graph: Graph, node: onnx.NodeProto) -> Callable[..., Array]:
    """To a constant shape, of which 0 keeps an axis and -1 takes what is left."""
    sizes = graph.constant(node, 1).tolist()
    return lambda codes: codes.reshape([codes.shape[i] if size == 0 else size for i, size in enumerate(sizes)])


def _transpose(graph: Graph, node: onnx.NodeProto) -> Callable[..., Array]:
    order = [int(axis) for axis in attributes_of(node).get("perm", [])]
    if not order or order[0] != 0:
        raise fault(node, f"its axes go to {order}; the batch must stay first")
    return lambda codes: codes.transpose(order)


def _slice(graph: Graph, node: onnx.NodeProto) -> Callable[..., Array]:
    if len(node.input) < 4:
        raise fault(node, "its axes must be given")
    starts, ends, axes = (graph.constant(node, index).tolist() for index in (1, 2, 3))
    steps = graph.constant(node, 4).tolist() if len(node.input) > 4 else [1] * len(starts)
    if 0 in axes or min(axes) < 0:
        raise fault(node, f"it cuts axes {axes}; they must be counted from the front, and the batch is never cut")

    def compute(codes: Array) -> Array:
        chosen = [slice(None)] * codes.ndim
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            chosen[axis] = slice(start, end, step)
        return codes[tuple(chosen)]

    return compute


def _concat(graph: Graph, node: onnx.NodeProto) -> Callable[..., Array]:
    axis = int(attributes_of(node)["axis"])
    if axis < 1:
        raise fault(node, f"it joins along axis {axis}; axes are counted from the front, and the batch is never joined")
    return lambda *codes: np.concatenate(codes, axis=axis)


MOVEMENT: MappingProxyType[str, Moving] = MappingProxyType(
    {
        "Clip": _clip,
        "MaxPool": _max_pool,
        "Flatten": _flatten,
        "Reshape": _reshape,
        "Transpose": _transpose,
        "Slice": _slice,
        "Concat": _concat,
    }
)


def movement(graph: Graph, node: onnx.NodeProto) -> Step:
    """The step of a node whose data inputs are stored codes, or a float Gemm's rows."""
    inputs = tuple(node.input) if node.op_type == "Concat" else (node.input[0],)
    return Step(node.output[0], inputs, MOVEMENT[node.op_type](graph, node))


def _limit(graph: Graph, node: onnx.NodeProto, index: int, default: int) -> int:
    given = index < len(node.input) and node.input[index]
    return int(graph.constant(node, index).item()) if given else default
