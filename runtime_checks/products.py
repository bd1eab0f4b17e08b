"""Convolutions and Gemms as steps: int32 accumulators, requantised or, for a Gemm, scaled to float32.

Accumulators are 4 or 8 times as large as the codes they become, so a layer takes some images at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType

import numpy as np
import onnx

from mecdeploy.runtime_checks import arithmetic, kernels
from mecdeploy.runtime_checks.patterns import Graph, Product, Quantized, attributes_of
from mecdeploy.runtime_checks.pooling import window_of
from mecdeploy.runtime_checks.steps import Array, Requantizing, Step

_VALUES_AT_ONCE = 2**20
"""Of the input or the output of a layer, whichever is more, as floats: 4 or 8 MB stay in the processor's cache."""


def _quantized_product(graph: Graph, node: onnx.NodeProto, y: Quantized) -> Step:
    """QLinearConv, or QGemm with codes as output."""
    product = graph.product(node)
    accumulate = _accumulator(product)
    multiplier = arithmetic.output_multiplier(product.input.scale, product.weight_scale, y.scale)

    def compute(x: Array) -> Array:
        return arithmetic.requantize(accumulate(x), multiplier, y.zero_point)

    return _in_parts(y.tensor, product, compute)


def real_gemm(graph: Graph, node: onnx.NodeProto) -> Step:
    """QGemm with float output, the logits or what a float island reads: f32(acc) * f32(s_x * s_w)."""
    product = graph.product(node)
    accumulate = _accumulator(product)
    multiplier = product.input.scale * product.weight_scale

    def compute(x: Array) -> Array:
        return accumulate(x).astype(np.float32) * multiplier

    return _in_parts(node.output[0], product, compute)


def _accumulator(product: Product) -> Callable[[Array], Array]:
    zero_point, weight, bias = product.input.zero_point, product.weight, product.bias
    if product.node.op_type == "Gemm":
        return lambda x: kernels.matrix_product(x, zero_point, weight, bias)
    window = window_of(product.node, (weight.shape[2], weight.shape[3]))
    groups = int(attributes_of(product.node).get("group", 1))
    return lambda x: kernels.convolve(x, zero_point, weight, bias, window, groups)


def _in_parts(output: str, product: Product, compute: Callable[[Array], Array]) -> Step:
    """`compute`, which treats every row of [N, ...] on its own, over as many rows at once as _VALUES_AT_ONCE allows."""

    def compute_parts(x: Array) -> Array:
        values = max(x.shape[1], len(product.weight)) * math.prod(x.shape[2:])
        rows = max(1, _VALUES_AT_ONCE // values)
        return np.concatenate([compute(x[start : start + rows]) for start in range(0, max(len(x), 1), rows)])

    return Step(output, (product.input.tensor,), compute_parts)


PRODUCTS: MappingProxyType[str, Requantizing] = MappingProxyType(
    {"Conv": _quantized_product, "Gemm": _quantized_product}
)
