"""Functions of each position: one small function a kind, each writing what onnxruntime fuses into an integer kernel.

To add a kind: a function here and its line in ELEMENTWISE, which every rule about kinds reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mecdeploy.export.emission.builder import GraphBuilder
from mecdeploy.export.graph import Add, Elementwise, Quantization

SMALLEST = np.finfo(np.float32).tiny
LARGEST_SUM_RATIO = 2.0**22
LARGEST_PRODUCT_RATIO = 2.0**15
"""Input scales over the output's. Kernels convert to int32 before they saturate: two codes of 255 at 2^22, or their
product at 2^15, stay below 2^31, beyond which the code is 0 in place of 255."""


@dataclass(frozen=True)
class Kind:
    """One kind of Elementwise.

    inputs: how many it reads. emit: writes it. problem: what, of the quantizations of its inputs and its output, its
    kernel cannot take; empty where it can.
    """

    inputs: int
    emit: Callable[[GraphBuilder, Elementwise], None]
    problem: Callable[[Sequence[Quantization], Quantization], str] = lambda inputs, output: ""


def emit_elementwise(builder: GraphBuilder, node: Elementwise) -> None:
    """Write a node of any kind."""
    ELEMENTWISE[node.kind].emit(builder, node)


def emit_add(builder: GraphBuilder, node: Add) -> None:
    """QLinearAdd, for one output: a second quantisation of the same sum is a second Add (split_add_outputs)."""
    (output,) = node.outputs
    reals = [builder.dequantize(name) for name in node.inputs]
    builder.quantize(builder.node("Add", reals, f"{output}/sum"), output)


def _emit_mul(builder: GraphBuilder, node: Elementwise) -> None:
    """QLinearMul."""
    reals = [builder.dequantize(name) for name in node.inputs]
    builder.quantize(builder.node("Mul", reals, f"{node.output}/product"), node.output)


def _mul_problem(inputs: Sequence[Quantization], output: Quantization) -> str:
    left, right = (np.float32(one.scale) for one in inputs)
    with np.errstate(all="ignore"):
        product = left * right
    if not (np.isfinite(product) and product >= SMALLEST):
        return f"the product of its input scales is {product}; it must be finite and a normal float32"
    return ratio_problem(float(product), output, LARGEST_PRODUCT_RATIO)


def _emit_sigmoid(builder: GraphBuilder, node: Elementwise) -> None:
    """QLinearSigmoid."""
    real = builder.node("Sigmoid", [builder.dequantize(node.inputs[0])], f"{node.output}/sigmoid")
    builder.quantize(real, node.output)


def _emit_leaky_relu(builder: GraphBuilder, node: Elementwise) -> None:
    """QLinearLeakyRelu."""
    real = builder.dequantize(node.inputs[0])
    builder.quantize(builder.node("LeakyRelu", [real], f"{node.output}/leaky_relu", alpha=node.alpha), node.output)


def _emit_hard_sigmoid(builder: GraphBuilder, node: Elementwise) -> None:
    """QLinearAdd of x / 6 and 1 / 2; the output's codes saturate where clip(., 0, 1) would.

    HardSigmoid itself has no integer kernel. x / 6 is a second reading of x's codes, at a sixth of their scale; 1 / 2
    is the code 1 at scale 1 / 2, and comes first: second, it would trade places with an x of width 1 inside the kernel,
    which rounds ties by place.
    """
    source = builder.quantization(node.inputs[0])
    sixth_scale = builder.initializer(f"{node.output}/sixth/scale", np.array(sixth(source.scale)))
    sixth_zero = builder.initializer(f"{node.output}/sixth/zero_point", np.array(source.zero_point, np.uint8))
    real = builder.node("DequantizeLinear", [node.inputs[0], sixth_scale, sixth_zero], f"{node.output}/sixth")
    one = builder.shared("hard_sigmoid/half", np.array(1, np.uint8))
    half_scale = builder.shared("hard_sigmoid/half/scale", np.array(0.5, np.float32))
    half_zero = builder.shared("hard_sigmoid/half/zero_point", np.array(0, np.uint8))
    half = builder.node("DequantizeLinear", [one, half_scale, half_zero], f"{node.output}/half")
    builder.quantize(builder.node("Add", [half, real], f"{node.output}/sum"), node.output)


def _hard_sigmoid_problem(inputs: Sequence[Quantization], output: Quantization) -> str:
    if sixth(inputs[0].scale) < SMALLEST:
        return f"a sixth of its input's scale {inputs[0].scale} is no normal float32"
    if output.zero_point != 0:
        return f"its output has zero_point {output.zero_point}; 0 is due, so that codes saturate where the real is 0"
    if np.float32(output.scale) * np.float32(output.qmax) > 1:
        largest = output.scale * output.qmax
        return f"its output reaches {largest}, scale {output.scale} at code {output.qmax}; it must saturate at 1"
    return ratio_problem(max(inputs[0].scale / 6, 0.5), output, LARGEST_SUM_RATIO)


def ratio_problem(scale: float, output: Quantization, largest: float) -> str:
    """What a kernel cannot take of an input scale over its output's; empty where it can."""
    ratio = scale / output.scale
    if ratio <= largest:
        return ""
    return (
        f"input scale / output scale is {ratio:.3g}; onnxruntime's int32 holds up to {largest:.0f}. "
        "The training diverged there: train again with a lower learning rate"
    )


def sixth(scale: float) -> np.float32:
    """The scale at which codes of `scale` mean a sixth, rounded once."""
    return np.float32(scale) / np.float32(6)


ELEMENTWISE: MappingProxyType[str, Kind] = MappingProxyType(
    {
        "mul": Kind(2, _emit_mul, _mul_problem),
        "sigmoid": Kind(1, _emit_sigmoid),
        "hard_sigmoid": Kind(1, _emit_hard_sigmoid, _hard_sigmoid_problem),
        "leaky_relu": Kind(1, _emit_leaky_relu),
    }
)
