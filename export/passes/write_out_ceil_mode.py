"""MaxPool's ceil_mode as padding.

Which windows ceil_mode keeps was settled only in opset 22: onnx's shape inference before it, and runtimes among
themselves, disagree about a window that starts in the far padding. Padding says the same without a choice, and is free:
padded places never win.
"""

from __future__ import annotations

from dataclasses import replace

from mecdeploy.export.config import ExportConfig
from mecdeploy.export.graph import IntegerGraph, MaxPool


def write_out_ceil_mode(graph: IntegerGraph, config: ExportConfig) -> IntegerGraph:
    """Give every MaxPool with ceil_mode the bottom and right padding that makes the same windows without it."""
    return replace(
        graph,
        nodes=tuple(
            _without_ceil_mode(node, graph.values[node.input].shape, graph.values[node.output].shape)
            if isinstance(node, MaxPool) and node.ceil_mode
            else node
            for node in graph.nodes
        ),
    )


def _without_ceil_mode(node: MaxPool, shape: tuple[int, ...], pooled: tuple[int, ...]) -> MaxPool:
    top, left, _, _ = node.padding
    ends = []
    for axis, start in enumerate((top, left)):
        span = node.dilation[axis] * (node.kernel[axis] - 1) + 1
        last_window_end = (pooled[1 + axis] - 1) * node.stride[axis] + span
        ends.append(max(0, last_window_end - shape[1 + axis] - start))
    return replace(node, padding=(top, left, ends[0], ends[1]), ceil_mode=False)
