"""Conv and Gemm: an integer product and its bias, rounded once."""

from __future__ import annotations

import numpy as np

from mecdeploy.export.emission.builder import GraphBuilder
from mecdeploy.export.emission.movement import reshape
from mecdeploy.export.emission.weights import emit_weight
from mecdeploy.export.graph import Conv, Gemm


def emit_conv(builder: GraphBuilder, node: Conv) -> None:
    """QLinearConv. The output is quantised right after the Conv: a Relu in between would be a node for nothing."""
    real = builder.node(
        "Conv",
        [builder.dequantize(node.input), *_weight_and_bias(builder, node)],
        f"{node.output}/sum",
        kernel_shape=node.weight.codes.shape[2:],
        strides=node.stride,
        pads=node.padding,
        dilations=node.dilation,
        group=node.groups,
    )
    builder.quantize(real, node.output)


def emit_gemm(builder: GraphBuilder, node: Gemm) -> None:
    """QGemm. A float output is f32(accumulator) * f32(input scale * weight scale).

    Gemm multiplies matrices. Codes of more dimensions become rows before it and get their shape back behind it, outside
    the DequantizeLinear and QuantizeLinear that it fuses with.
    """
    value = builder.values[node.output]
    is_matrix = len(value.shape) == 1
    codes = node.input if is_matrix else reshape(builder, node.input, f"{node.name}/rows", node.weight.codes.shape[1:])
    inputs = [builder.dequantize(codes, like=node.input), *_weight_and_bias(builder, node)]
    product = node.output if is_matrix else f"{node.output}/product"
    if value.quantization is None:
        builder.node("Gemm", inputs, product, transB=1)
    else:
        builder.quantize(builder.node("Gemm", inputs, f"{node.output}/sum", transB=1), product, like=node.output)
    if not is_matrix:
        reshape(builder, product, node.output, value.shape, value.batch_axis)


def _weight_and_bias(builder: GraphBuilder, node: Conv | Gemm) -> tuple[str, str]:
    """Return the weight and the bias as reals.

    The bias scale is f32(input scale * weight scale), computed as onnxruntime does: off by 1e-3 it refuses the fusion.
    """
    source = builder.quantization(node.input)
    weight = emit_weight(builder, node.name, node.weight)
    codes = builder.initializer(f"{node.name}/bias", node.bias)
    scale = builder.initializer(f"{node.name}/bias/scale", np.float32(source.scale) * node.weight.scale)
    return weight, builder.node("DequantizeLinear", [codes, scale], f"{node.name}/bias/real", axis=0)
