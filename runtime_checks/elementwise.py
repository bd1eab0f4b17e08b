"""Functions of each position between DequantizeLinear and QuantizeLinear: one small function an op type.

Each is a table over stored codes. To add an operator: its table in arithmetic.py, a function here, and its line in
ELEMENTWISE.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import onnx

from mecdeploy.runtime_checks import arithmetic
from mecdeploy.runtime_checks.arithmetic import Codes
from mecdeploy.runtime_checks.patterns import Graph, Quantized, attributes_of, fault
from mecdeploy.runtime_checks.steps import Array, Requantizing, Step


def _add(graph: Graph, node: onnx.NodeProto, y: Quantized) -> Step:
    """QLinearAdd of two tensors of one shape, or of a constant and a tensor (a hard sigmoid's 1/2 and x/6)."""
    a, b = graph.dequantized(node, 0), graph.dequantized(node, 1)
    if graph.constants.get(b.tensor) is not None:
        # onnxruntime's broadcasting takes x for the scalar where its innermost axis, in a layout it chose, is 1
        raise fault(node, "its constant is the second operand, where the rounding depends on shapes; it belongs first")
    constant = graph.constants.get(a.tensor)
    if constant is not None:
        if constant.value.size != 1 or constant.value.dtype != np.uint8:
            raise fault(node, f"its constant is {constant.value.dtype} {list(constant.value.shape)}, not one uint8")
        # the kernel always takes the scalar for its second operand
        table = arithmetic.addition_table(b.scale, b.zero_point, a.scale, a.zero_point, y.scale, y.zero_point)
        return _look_up(y, b, table[:, int(constant.value.item())])
    table = arithmetic.addition_table(a.scale, a.zero_point, b.scale, b.zero_point, y.scale, y.zero_point)
    exchanged = arithmetic.addition_table(b.scale, b.zero_point, a.scale, a.zero_point, y.scale, y.zero_point)

    def compute(left: Array, right: Array) -> Array:
        if left.shape != right.shape:
            raise ValueError(f"{list(left.shape)} + {list(right.shape)}")
        if left.size == 1:  # two scalars: the kernel takes the first for its second operand
            return exchanged[right, left]
        return _look_up_pairs(table, left, right)

    return Step(y.tensor, (a.tensor, b.tensor), compute)


def _mul(graph: Graph, node: onnx.NodeProto, y: Quantized) -> Step:
    """QLinearMul, its operands broadcast: [N, C, 1, 1] gates [N, C, H, W]. It is the same in either order."""
    a, b = graph.dequantized(node, 0), graph.dequantized(node, 1)
    table = arithmetic.multiplication_table(a.scale, a.zero_point, b.scale, b.zero_point, y.scale, y.zero_point)
    return Step(y.tensor, (a.tensor, b.tensor), lambda left, right: _look_up_pairs(table, left, right))


def _sigmoid(graph: Graph, node: onnx.NodeProto, y: Quantized) -> Step:
    """QLinearSigmoid."""
    x = graph.dequantized(node, 0)
    return _look_up(y, x, arithmetic.sigmoid_table(x.scale, x.zero_point, y.scale, y.zero_point))


def _leaky_relu(graph: Graph, node: onnx.NodeProto, y: Quantized) -> Step:
    """QLinearLeakyRelu; alpha 0 is a ReLU."""
    x = graph.dequantized(node, 0)
    alpha = np.float32(attributes_of(node).get("alpha", 0.01))
    return _look_up(y, x, arithmetic.leaky_relu_table(x.scale, x.zero_point, y.scale, y.zero_point, alpha))


ELEMENTWISE: MappingProxyType[str, Requantizing] = MappingProxyType(
    {"Add": _add, "Mul": _mul, "Sigmoid": _sigmoid, "LeakyRelu": _leaky_relu}
)


def _look_up(y: Quantized, x: Quantized, table: Codes) -> Step:
    def compute(codes: Array) -> Array:
        return np.asarray(np.take(table, codes))

    return Step(y.tensor, (x.tensor,), compute)


def _look_up_pairs(table: Codes, left: Array, right: Array) -> Array:
    return np.asarray(np.take(table.reshape(-1), (left.astype(np.uint16) << 8) | right))
