"""The arithmetic that onnxruntime's integer kernels do on x86-64, as differentiable torch functions.

Operands are floats holding integers; every function reproduces the kernel's rounding, in its order. docs/exactness.md
lists the formulas and how they were established. Gradients are straight-through, so the last phase of training runs on
exactly what is deployed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mecdeploy.training.quantizers import ActivationQuantizer, QTensor, round_clamp, round_through

if TYPE_CHECKING:
    from mecdeploy.training.units import Geometry

EXACT_FLOAT32 = 2**24
"""Integers below this are exact in float32."""

LARGEST_BIAS = 2**30
"""Bias codes stay below this, so that an int32 accumulator has room for the products."""

SMALLEST_SCALE = 1e-30
"""A dead channel keeps a scale: onnxruntime divides by it."""


def fold(
    step: Tensor, bias: Tensor | None, batch_norm: torch.nn.BatchNorm2d | None, input_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight scale and bias of a layer after its BatchNorm has gone into them: ([O] float32, [O] float32 real units).

    step: [O]. gamma/sigma multiplies the scale and never the integers; gamma is positive (prepare absorbed its sign).
    A channel whose bias would overflow an int32 at input_scale * scale gets the scale at which it just fits.
    """
    real_bias = torch.zeros_like(step) if bias is None else bias
    scale = step
    if batch_norm is not None:
        assert batch_norm.running_mean is not None and batch_norm.running_var is not None
        gain = batch_norm.weight.abs() / torch.sqrt(batch_norm.running_var + batch_norm.eps)
        scale = step * gain
        real_bias = batch_norm.bias + (real_bias - batch_norm.running_mean) * gain
    floor = (real_bias.abs() / (input_scale * LARGEST_BIAS)).clamp_min(SMALLEST_SCALE)
    return torch.maximum(scale, floor.detach()), real_bias


def bias_codes(bias: Tensor, product_scale: Tensor) -> Tensor:
    """Bias as int32 codes at scale s_x * s_w, [O] float32 holding integers."""
    return round_through(bias / product_scale)


def accumulate(x: QTensor, weight: Tensor, bias: Tensor, geometry: Geometry | None) -> Tensor:
    """The int32 accumulator of a convolution, or of a Gemm where geometry is None: float holding exact integers.

    x.codes: [N, C, H, W] or [N, C]; weight: [O, ...] codes; bias: [O] codes.
    Products are summed in float32 where no partial sum can reach 2^24, else in float64. Where only the bias is too long
    for float32, as a dead channel's is, it is added in float64 afterwards: a float64 convolution takes 3 times as long.
    """
    largest = max(-x.lower, x.upper)
    products = weight.detach().abs().flatten(1).sum(1) * largest
    longest_sum, longest = torch.stack([products.max(), (products + bias.detach().abs()).max()]).tolist()
    exact = torch.float32 if longest_sum < EXACT_FLOAT32 else torch.float64
    late_bias = exact == torch.float32 and not longest < EXACT_FLOAT32
    codes, weight, early = x.codes.to(exact), weight.to(exact), None if late_bias else bias.to(exact)
    if geometry is None:
        result = F.linear(codes, weight, early)
    else:
        g = geometry
        result = F.conv2d(codes, weight, early, g.stride, g.padding, g.dilation, g.groups)
    return result.double() + bias.double().view(-1, *[1] * (result.dim() - 2)) if late_bias else result


def requantize(accumulator: Tensor, product_scale: Tensor, output: ActivationQuantizer) -> QTensor:
    """QLinearConv and QGemm: clamp(round(f32(acc) * M)) with M = f32(f32(s_x * s_w) / s_y).

    accumulator: [N, O, ...]; product_scale: [O], f32(s_x * s_w).
    """
    step = output.effective_step(accumulator[0].numel())
    multiplier = (product_scale / step).view(-1, *[1] * (accumulator.dim() - 2))
    return output.from_ratio(accumulator.float() * multiplier, step)


def add(a: QTensor, b: QTensor, output: ActivationQuantizer) -> QTensor:
    """QLinearAdd: clamp(round(fma(a, ra, fma(b, rb, zc)))) on stored codes, ra = sa/sy, zc = zy - (ra*za + rb*zb).

    A fused multiply-add rounds once: here the product is exact in float64 and the sum is rounded to float32.
    """
    step = output.effective_step(a.codes[0].numel())
    ratio_a, ratio_b = a.scale / step, b.scale / step
    fixed = output.zero_point - _fma(ratio_a, a.zero_point, ratio_b * b.zero_point)
    total = _fma(a.codes + a.zero_point, ratio_a, _fma(b.codes + b.zero_point, ratio_b, fixed))
    codes = round_clamp(total, 0, output.qmax) - output.zero_point
    return QTensor(codes, step, output.zero_point, output.qmax)


def global_average(x: QTensor, output: ActivationQuantizer) -> QTensor:
    """QLinearGlobalAveragePool: clamp(round(S * (sx / (sy * n)))), S the sum of n centred codes.

    [N, C, H, W] -> [N, C, 1, 1].
    """
    step = output.effective_step(x.codes.shape[1])
    count = x.codes.shape[2] * x.codes.shape[3]
    total = x.codes.sum((2, 3), keepdim=True, dtype=torch.float64).float()
    return output.from_ratio(total * (x.scale / (step * count)), step)


def _fma(x: Tensor, y: Tensor | int, z: Tensor) -> Tensor:
    return (x.double() * y + z.double()).float()
