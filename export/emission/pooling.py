"""Means over windows, requantised."""

from __future__ import annotations

from mecdeploy.export.emission.builder import GraphBuilder
from mecdeploy.export.graph import AveragePool, GlobalAveragePool


def emit_average_pool(builder: GraphBuilder, node: AveragePool) -> None:
    """QLinearAveragePool."""
    real = builder.node(
        "AveragePool",
        [builder.dequantize(node.input)],
        f"{node.output}/mean",
        kernel_shape=node.kernel,
        strides=node.stride,
        pads=node.padding,
        count_include_pad=int(node.count_include_pad),
    )
    builder.quantize(real, node.output)


def emit_global_average_pool(builder: GraphBuilder, node: GlobalAveragePool) -> None:
    """QLinearGlobalAveragePool; its QuantizeLinear must come before the Flatten."""
    real = builder.node("GlobalAveragePool", [builder.dequantize(node.input)], f"{node.output}/mean")
    builder.quantize(real, node.output)
