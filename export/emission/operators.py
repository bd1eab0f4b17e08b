"""One function per node type, each writing the pattern that onnxruntime fuses into an integer kernel.

The patterns were found by measurement; each departure noted here costs the integer kernel. To add an operator: a
dataclass in graph.py, its rule in validation.py and its shape in shapes.py, a function here, a line in EMITTERS.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

from mecdeploy.export.emission.builder import GraphBuilder
from mecdeploy.export.emission.weights import emit_weight
from mecdeploy.export.graph import Add, Conv, Flatten, Gemm, GlobalAveragePool, MaxPool


def emit_conv(builder: GraphBuilder, node: Conv) -> None:
    """QLinearConv. The output is quantised right after the Conv: a Relu in between would be a node for nothing."""
    real = builder.node(
        "Conv",
        _weighted_inputs(builder, node),
        f"{node.output}/sum",
        kernel_shape=node.weight.codes.shape[2:],
        strides=node.stride,
        pads=node.padding,
        dilations=node.dilation,
        group=node.groups,
    )
    builder.quantize(real, node.output)


def emit_gemm(builder: GraphBuilder, node: Gemm) -> None:
    """QGemm. A float output is the logits: f32(accumulator) * f32(input scale * weight scale)."""
    inputs = _weighted_inputs(builder, node)
    if builder.values[node.output].quantization is None:
        builder.node("Gemm", inputs, node.output, transB=1)
    else:
        builder.quantize(builder.node("Gemm", inputs, f"{node.output}/sum", transB=1), node.output)


def emit_add(builder: GraphBuilder, node: Add) -> None:
    """QLinearAdd, for one output: a second quantisation of the same sum is a second Add (split_add_outputs)."""
    (output,) = node.outputs
    reals = [builder.dequantize(name) for name in node.inputs]
    builder.quantize(builder.node("Add", reals, f"{output}/sum"), output)


def emit_max_pool(builder: GraphBuilder, node: MaxPool) -> None:
    """MaxPool on the uint8 codes: order is all it needs, and codes keep it."""
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


def emit_global_average_pool(builder: GraphBuilder, node: GlobalAveragePool) -> None:
    """QLinearGlobalAveragePool; its QuantizeLinear must come before the Flatten."""
    real = builder.node("GlobalAveragePool", [builder.dequantize(node.input)], f"{node.output}/mean")
    builder.quantize(real, node.output)


def emit_flatten(builder: GraphBuilder, node: Flatten) -> None:
    """Flatten on the uint8 codes, so that the Gemm behind it has a DequantizeLinear directly before it."""
    builder.node("Flatten", [node.input], node.output, axis=1)


def _weighted_inputs(builder: GraphBuilder, node: Conv | Gemm) -> list[str]:
    """Return the input, the weight and the bias as reals.

    The bias scale is f32(input scale * weight scale), computed as onnxruntime does: off by 1e-3 it refuses the fusion.
    """
    quantization = builder.values[node.input].quantization
    assert quantization is not None  # validate_graph lets no node read a float
    real = builder.dequantize(node.input)
    weight = emit_weight(builder, node.name, node.weight)
    codes = builder.initializer(f"{node.name}/bias", node.bias)
    scale = builder.initializer(f"{node.name}/bias/scale", np.float32(quantization.scale) * node.weight.scale)
    bias = builder.node("DequantizeLinear", [codes, scale], f"{node.name}/bias/real", axis=0)
    return [real, weight, bias]


EMITTERS: MappingProxyType[type[Any], Callable[[GraphBuilder, Any], None]] = MappingProxyType(
    {
        Conv: emit_conv,
        Gemm: emit_gemm,
        Add: emit_add,
        MaxPool: emit_max_pool,
        GlobalAveragePool: emit_global_average_pool,
        Flatten: emit_flatten,
    }
)
