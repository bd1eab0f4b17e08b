"""The arithmetic that onnxruntime's integer kernels do on x86-64, as differentiable torch functions.

Operands are floats holding integers; every function reproduces the kernel's rounding, in its order. docs/exactness.md
lists the formulas and how they were established. Gradients are straight-through, so the last phase of training runs on
exactly what is deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mecdeploy.training import quantizers
from mecdeploy.training.fused import look_up
from mecdeploy.training.lsq import round_through
from mecdeploy.training.quantizers import ActivationQuantizer, QTensor

if TYPE_CHECKING:
    from mecdeploy.training.geometry import Geometry

EXACT_FLOAT32 = 2**24
"""Integers below this are exact in float32."""

LARGEST_WEIGHT = 2**7
"""No weight code, at most 8 bits wide, is larger."""

LARGEST_BIAS = 2**30
"""Bias codes stay below this, so that an int32 accumulator has room for the products."""

SUMS = 256 * 256
"""Of two bytes."""

LOGISTIC_RANGE = 18.0
LOGISTIC_NUMERATOR = (
    4.37031012579801e-11,
    1.15627324459942e-07,
    6.08574864600143e-05,
    8.51377133304701e-03,
    2.48287947061529e-01,
)
LOGISTIC_DENOMINATOR = (
    6.10247389755681e-13,
    5.76102136993427e-09,
    6.29106785017040e-06,
    1.70198817374094e-03,
    1.16817656904453e-01,
    9.93151921023180e-01,
)

SMALLEST_SCALE = 1e-30
"""A dead channel keeps a scale: onnxruntime divides by it."""


def fold(
    step: Tensor,
    bias: Tensor | None,
    batch_norm: torch.nn.BatchNorm2d | torch.nn.BatchNorm1d | None,
    input_scale: Tensor,
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
    """The int32 accumulator of a convolution, or of a Gemm where geometry is None, rounded to float32 once.

    x.codes: [N, C, H, W], or [N, ..., I]; weight: [O, ...] codes; bias: [O] codes, float32.
    Products are summed in float32 where no partial sum can reach 2^24, else in float64. The bias comes last: products
    and bias are then exact floats, and their sum is rounded once, as the kernel rounds its int32.
    """
    exact = _exact_type(weight, max(-x.lower, x.upper))
    codes, weight = x.codes.to(exact), weight.to(exact)
    result = F.linear(codes, weight) if geometry is None else convolve(codes, weight, None, geometry)
    return result.add_(per_channel(bias.to(exact), geometry)).float()


def _exact_type(weight: Tensor, largest: int) -> torch.dtype:
    """The float type in which products with codes up to `largest` add up exactly."""
    fan_in = weight[0].numel()
    if fan_in * LARGEST_WEIGHT * largest < EXACT_FLOAT32:  # whatever the weights: nothing has to be read
        return torch.float32
    longest = weight.detach().abs().flatten(1).sum(1).max() * largest
    return torch.float32 if float(longest) < EXACT_FLOAT32 else torch.float64


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolution with a padding of its own on every side: [N, C, H, W] -> [N, O, H', W']."""
    padding = geometry.symmetric_padding
    if padding is None:
        x, padding = F.pad(x, geometry.pad_argument), (0, 0)
    return F.conv2d(x, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)


def per_channel(values: Tensor, geometry: Geometry | None) -> Tensor:
    """One value for each output channel, [O], as it broadcasts to a convolution's output, or to a linear layer's."""
    return values if geometry is None else values.view(-1, 1, 1)


def requantize(accumulator: Tensor, product_scale: Tensor, output: ActivationQuantizer) -> QTensor:
    """QLinearConv and QGemm: clamp(round(f32(acc) * M)) with M = f32(f32(s_x * s_w) / s_y).

    accumulator: [N, O, H, W] or [N, ..., O]; product_scale: f32(s_x * s_w), as `per_channel` shapes it.
    """
    step = output.effective_step(accumulator[0].numel())
    return output.from_product(accumulator.float(), product_scale / step, step)


def add(a: QTensor, b: QTensor, outputs: Sequence[ActivationQuantizer]) -> tuple[QTensor, ...]:
    """QLinearAdd: clamp(round(fma(a, ra, fma(b, rb, zc)))) on stored codes, ra = sa/sy, zc = zy - (ra*za + rb*zb).

    Once for each output. Two bytes have 65,536 sums: they are computed once, and looked up.
    """
    tables = [_add_table(a, b, output) for output in outputs]

    def answers(codes_a: Tensor, codes_b: Tensor) -> tuple[Tensor, ...]:
        index = torch.add(codes_b, codes_a, alpha=256).add_(256 * a.zero_point + b.zero_point)
        index = index.nan_to_num_(nan=SUMS).to(torch.int32)  # else NaN would be an index out of the table
        return tuple(look_up(table, index) for table in tables)

    return quantizers.add(a, b, outputs, answers)


@torch.no_grad()
def _add_table(a: QTensor, b: QTensor, output: ActivationQuantizer) -> Tensor:
    """Centred codes of all sums, float32 [SUMS + 1], by stored code of a, then of b; and NaN, the sum of what is none.

    A fused multiply-add rounds once: here the product is exact in float64 and the sum is rounded to float32.
    """
    step, zero_point = output.effective_step(), output.zero_point
    ratio_a, ratio_b = a.scale / step, b.scale / step
    stored = torch.arange(256, dtype=a.scale.dtype, device=a.scale.device)
    fixed = zero_point - _fma(ratio_a, a.zero_point, ratio_b * b.zero_point)
    total = _fma(stored[:, None], ratio_a, _fma(stored, ratio_b, fixed))
    codes = total.round().clamp_(output.qmin, output.qmax).flatten() - zero_point
    return torch.cat([codes, codes.new_full((1,), float("nan"))])


def multiply(a: QTensor, b: QTensor, output: ActivationQuantizer) -> QTensor:
    """QLinearMul: clamp(round(f32(f32(ab * M) + zy))), ab the product of centred codes, M = f32(f32(sa * sb) / sy).

    The zero point is added before rounding. Shapes broadcast.
    """
    product = a.codes * b.codes  # below 2^17: exact
    step = output.effective_step(product[0].numel())
    return output.from_stored(product * (a.scale * b.scale / step) + output.zero_point, step)


def sigmoid(x: QTensor, output: ActivationQuantizer) -> QTensor:
    """QLinearSigmoid: a table over the stored codes of clamp(round(y / s_y) + z_y), y = logistic(f32(s_x * (c - z_x))).

    logistic is onnxruntime's rational approximation in float32, with fused multiply-adds.
    """
    return _through_table(x, output, torch.sigmoid, _logistic)


def hard_sigmoid(x: QTensor, output: ActivationQuantizer) -> QTensor:
    """clip(x / 6 + 1 / 2, 0, 1) as QLinearAdd: x read at f32(s_x / 6), plus the code 1 of a constant at scale 1/2."""
    sixth = QTensor(x.codes, x.scale / 6, x.zero_point, x.qmax, x.qmin)
    one = torch.ones((), dtype=x.codes.dtype, device=x.codes.device)
    return add(sixth, QTensor(one, torch.full_like(x.scale, 0.5), 0, 1), [output])[0]


def leaky_relu(x: QTensor, output: ActivationQuantizer, alpha: float) -> QTensor:
    """QLinearLeakyRelu: a table over the stored codes of clamp(round(y / s_y) + z_y), y = f32(alpha * x) below 0."""
    slope = float(torch.tensor(alpha, dtype=torch.float32))
    return _through_table(
        x, output, lambda real: F.leaky_relu(real, slope), lambda real: torch.where(real >= 0, real, slope * real)
    )


def average(
    x: QTensor, kernel: tuple[int, int], geometry: Geometry, include_pad: bool, output: ActivationQuantizer
) -> QTensor:
    """QLinearAveragePool: clamp(round(f32(f32(mean / s_y) + z_y))), the mean of reals added row by row in float32.

    [N, C, H, W] -> [N, C, H', W']. Not for a window that is the whole image: that is `global_average`.
    """
    real = F.pad(x.dequantize(), geometry.pad_argument)
    total = _add_taps(real, kernel, geometry)
    if include_pad:
        count = torch.full((), float(kernel[0] * kernel[1]), dtype=total.dtype, device=total.device)
    else:
        inside = torch.ones(1, 1, *x.codes.shape[2:], dtype=total.dtype, device=total.device)
        count = _add_taps(F.pad(inside, geometry.pad_argument), kernel, geometry)
    step = output.effective_step(total[0].numel())
    return output.from_stored(total / count / step + output.zero_point, step)


def _add_taps(x: Tensor, kernel: tuple[int, int], geometry: Geometry) -> Tensor:
    """Sum over windows of a padded [N, C, H, W], in the order of the kernel's rows."""
    vertical, horizontal = geometry.stride
    rows = (x.shape[2] - kernel[0]) // vertical + 1
    columns = (x.shape[3] - kernel[1]) // horizontal + 1
    total = x.new_zeros(())
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            bottom, right = i + (rows - 1) * vertical + 1, j + (columns - 1) * horizontal + 1
            total = total + x[:, :, i:bottom:vertical, j:right:horizontal]
    return total


def global_average(x: QTensor, output: ActivationQuantizer) -> QTensor:
    """QLinearGlobalAveragePool: clamp(round(S * (sx / (sy * n)))), S the sum of n centred codes.

    [N, C, H, W] -> [N, C, 1, 1].
    """
    step = output.effective_step(x.codes.shape[1])
    count = x.codes.shape[2] * x.codes.shape[3]
    total = x.codes.sum((2, 3), keepdim=True, dtype=torch.float64).float()
    return output.from_product(total, x.scale / (step * count), step)


def _through_table(
    x: QTensor, output: ActivationQuantizer, smooth: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor]
) -> QTensor:
    """Codes by a table of `exact` over all 256 stored codes; gradients by `smooth`, the same function."""
    step = output.effective_step(x.codes[0].numel())
    with torch.no_grad():
        stored = torch.arange(256, device=x.codes.device) - x.zero_point
        table = exact(x.scale * stored.to(x.scale.dtype)) / step
        table = torch.cat([table, table.new_full((1,), float("nan"))])  # of what is no code
        ratio = table[(x.codes + x.zero_point).nan_to_num_(nan=256.0).long()]
    if torch.is_grad_enabled():
        differentiable = smooth(x.dequantize()) / step
        ratio = ratio + (differentiable - differentiable.detach())
    return output.from_ratio(ratio, step)


def _logistic(x: Tensor) -> Tensor:
    """Onnxruntime's logistic: x P(x^2) / Q(x^2) + 1/2 on [-18, 18], in float32 with fused multiply-adds.

    The coefficients are those of Eigen's approximation. The multiply-adds are rounded once, as in _fma.
    """
    x = x.clamp(-LOGISTIC_RANGE, LOGISTIC_RANGE)
    square = x * x
    numerator, denominator = (_polynomial(square, terms) for terms in (LOGISTIC_NUMERATOR, LOGISTIC_DENOMINATOR))
    return (x * numerator / denominator + 0.5).clamp_min(0.0)


def _polynomial(x: Tensor, terms: tuple[float, ...]) -> Tensor:
    first, *others = (torch.tensor(term, dtype=x.dtype, device=x.device) for term in terms)
    result = first.expand_as(x)
    for term in others:
        result = _fma(result, x, term)
    return result


def _fma(x: Tensor, y: Tensor | int, z: Tensor) -> Tensor:
    return (x.double() * y + z.double()).float()
