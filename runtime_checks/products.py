"""Convolutions and Gemms as steps: int32 accumulators, requantised or, for a Gemm, scaled to float32."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import numpy as np
import onnx

from mecdeploy.runtime_checks import arithmetic, kernels
from mecdeploy.runtime_checks.patterns import Graph, Product, Quantized, attributes_of
from mecdeploy.runtime_checks.pooling import window_of
from mecdeploy.runtime_checks.steps import Array, Requantizing, Step


def _quantized_product(graph: Graph, node: onnx.NodeProto, y: Quantized) -> Step:
    """QLinearConv, or QGemm with codes as output."""
    product = graph.product(node)
    accumulate = _accumulator(product)
    multiplier = arithmetic.output_multiplier(product.input.scale, product.weight_scale, y.scale)
    return Step(
        y.tensor,
        (product.input.tensor,),
        lambda x: arithmetic.requantize(accumulate(x), multiplier, y.zero_point),
    )


def real_gemm(graph: Graph, node: onnx.NodeProto) -> Step:
    """QGemm with float output, the logits or what a float island reads: f32(acc) * f32(s_x * s_w)."""
    product = graph.product(node)
    accumulate = _accumulator(product)
    multiplier = product.input.scale * product.weight_scale
    return Step(node.output[0], (product.input.tensor,), lambda x: accumulate(x).astype(np.float32) * multiplier)


def _accumulator(product: Product) -> Callable[[Array], Array]:
    zero_point, weight, bias = product.input.zero_point, product.weight, product.bias
    if product.node.op_type == "Gemm":
        return lambda x: kernels.matrix_product(x, zero_point, weight, bias)
    window = window_of(product.node, (weight.shape[2], weight.shape[3]))
    groups = int(attributes_of(product.node).get("group", 1))
    return lambda x: kernels.convolve(x, zero_point, weight, bias, window, groups)


PRODUCTS: MappingProxyType[str, Requantizing] = MappingProxyType(
    {"Conv": _quantized_product, "Gemm": _quantized_product}
)
