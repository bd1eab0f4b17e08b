"""The arithmetic of onnxruntime's fused integer kernels, written again in numpy.

Everything here was found by comparing with onnxruntime 1.32 on x86-64 (AVX2 and later) until nothing differed; each
function says over how many outputs. Together, on 2,662 random graphs of all units, with ties, both kinds of zero points
and channel counts that fill no vector: 0 of 8.7e8 integers. All reals are float32, every named operation rounds once,
to nearest even. onnxruntime's ARM kernels add and pool in fixed point, so equality is claimed for x86-64 only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]
Real = NDArray[np.float32]

EXACT_IN_FLOAT32 = 2**24
INT32_LIMIT = 2**31


def quantize(real: Real, scale: np.float32, zero_point: int) -> Codes:
    """QuantizeLinear: clamp(rint(x / s) + z, 0, 255), with a true division; NaN becomes the lower bound.

    0 of 4e6 values differ, exact ties included.
    """
    steps = np.divide(real, scale, dtype=np.float32)
    # fmax and fmin return the number when one side is NaN, as the kernel's comparisons do.
    steps = np.fmin(np.fmax(steps, np.float32(-zero_point)), np.float32(255 - zero_point))
    return (np.rint(steps) + np.float32(zero_point)).astype(np.uint8)


def requantize(accumulator: NDArray[np.floating], multiplier: Real, zero_point: int) -> Codes:
    """Integer accumulators to stored codes: clamp(rint(clamp(f32(acc) * M, -z, 255 - z)) + z).

    accumulator: [N, O, ...], integer-valued, exact. multiplier: [O] or [1], see output_multiplier.
    0 of 8.8e6 outputs of QLinearConv differ; QGemm and QLinearGlobalAveragePool round the same way.
    """
    shape = (1, -1) + (1,) * (accumulator.ndim - 2)
    steps = accumulator.astype(np.float32)  # one rounding where |acc| > 2**24, as the int32 conversion does
    steps *= multiplier.reshape(shape)
    np.clip(steps, np.float32(-zero_point), np.float32(255 - zero_point), out=steps)
    np.rint(steps, out=steps)
    steps += np.float32(zero_point)
    return steps.astype(np.uint8)


def output_multiplier(input_scale: np.float32, weight_scale: Real, output_scale: np.float32) -> Real:
    """M = f32(f32(s_x * s_w) / s_y), in that order; [O]."""
    return (np.float32(input_scale) * weight_scale) / np.float32(output_scale)


def fused_multiply_add(a: Real | np.float32, b: Real | np.float32, c: Real | np.float32) -> Real:
    """Multiply and add, a * b + c, with one rounding, for float32 values.

    The product is exact in float64 (24 + 24 bits). The sum is rounded to odd there, which makes the second rounding,
    to float32, the only one that counts (Boldo and Melquiond 2008, "Emulation of a FMA and correctly rounded sums").
    """
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    addend = np.asarray(c, np.float64)
    total = np.asarray(product + addend)
    recovered = total - product
    error = (product - (total - recovered)) + (addend - recovered)
    even = (total.view(np.int64) & 1) == 0
    towards = np.where(error > 0, np.inf, -np.inf)
    odd = np.where((error != 0) & even, np.nextafter(total, towards), total)
    result: Real = odd.astype(np.float32)
    return result


def addition_table(
    scale_a: np.float32, zero_a: int, scale_b: np.float32, zero_b: int, scale_y: np.float32, zero_y: int
) -> Codes:
    """QLinearAdd as a table [256, 256]: the stored code of the sum for every pair of stored codes (a, b).

    ra = sa/sy, rb = sb/sy; zc = f32(zy - fma(ra, za, f32(rb * zb))); clamp(rint(fma(a, ra, fma(b, rb, zc)))).
    Both the fused constant and b before a matter: over all pairs of 400 random scale sets (2.6e7 sums, half of them at
    scales in simple ratios) 0 differ so; 8 with the constant in plain float32, 1e4 with a before b.
    """
    ratio_a = np.float32(scale_a) / np.float32(scale_y)
    ratio_b = np.float32(scale_b) / np.float32(scale_y)
    offset = fused_multiply_add(ratio_a, np.float32(zero_a), ratio_b * np.float32(zero_b))
    fixed = np.float32(zero_y) - offset
    codes = np.arange(256, dtype=np.float32)
    inner = fused_multiply_add(codes, ratio_b, fixed)
    return _saturate(fused_multiply_add(codes[:, None], ratio_a, inner[None, :]))


def multiplication_table(
    scale_a: np.float32, zero_a: int, scale_b: np.float32, zero_b: int, scale_y: np.float32, zero_y: int
) -> Codes:
    """QLinearMul as a table [256, 256]: the stored code of the product for every pair of stored codes (a, b).

    M = f32(f32(s_a * s_b) / s_y); clamp(rint(f32(f32((a - z_a) * (b - z_b)) * M) + z_y)), the zero point added before
    rounding, without a fused step: over 2e8 products 0 differ; 6e4 with the zero point after rounding, 2e3 fused.
    """
    codes = np.arange(256, dtype=np.float32)
    product = np.multiply.outer(codes - np.float32(zero_a), codes - np.float32(zero_b))  # 17 bits: exact
    multiplier = (np.float32(scale_a) * np.float32(scale_b)) / np.float32(scale_y)
    return _saturate(product * multiplier + np.float32(zero_y))


def _saturate(steps: Real) -> Codes:
    """clamp(rint(steps)), but 0 above int32: the kernels of sums and products convert to int32 before they clamp."""
    held = np.where(steps < INT32_LIMIT, steps, np.float32(0))
    return np.clip(np.rint(held), 0, 255).astype(np.uint8)


_ODD_TERMS = (
    4.37031012579801e-11,
    1.15627324459942e-07,
    6.08574864600143e-05,
    8.51377133304701e-03,
    2.48287947061529e-01,
)
_EVEN_TERMS = (
    6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06, 1.70198817374094e-03, 1.16817656904453e-01,
    9.93151921023180e-01,
)  # fmt: skip
"""x * P(x^2) / Q(x^2) is the logistic function less 1/2; highest power first. The coefficients are Eigen's."""


def logistic(real: Real) -> Real:
    """The Sigmoid of onnxruntime in float32: a rational approximation from -18 to 18, its polynomials by fused steps.

    0 of 3e6 values of its float Sigmoid differ.
    """
    x: Real = np.clip(real, np.float32(-18), np.float32(18))
    square = x * x
    numerator, denominator = (_polynomial(square, terms) for terms in (_ODD_TERMS, _EVEN_TERMS))
    result: Real = np.maximum((x * numerator) / denominator + np.float32(0.5), np.float32(0))
    return result


def _polynomial(x: Real, terms: tuple[float, ...]) -> Real:
    total: Real = np.full_like(x, terms[0])
    for term in terms[1:]:
        total = fused_multiply_add(total, x, np.float32(term))
    return total


def sigmoid_table(scale_x: np.float32, zero_x: int, scale_y: np.float32, zero_y: int) -> Codes:
    """QLinearSigmoid as a table [256] over the stored codes, as the kernel itself holds it. 0 of 5e6 differ."""
    return quantize(logistic(dequantize(_every_code(), scale_x, zero_x)), scale_y, zero_y)


def leaky_relu_table(scale_x: np.float32, zero_x: int, scale_y: np.float32, zero_y: int, alpha: np.float32) -> Codes:
    """QLinearLeakyRelu as a table [256] over the stored codes. 0 of 1e7 differ, over ten alphas."""
    real = dequantize(_every_code(), scale_x, zero_x)
    return quantize(np.where(real >= 0, real, np.float32(alpha) * real), scale_y, zero_y)


def dequantize(codes: Codes, scale: np.float32, zero_point: int) -> Real:
    """DequantizeLinear: f32(code - z) * s."""
    return (codes.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)


def _every_code() -> Codes:
    return np.arange(256, dtype=np.uint8)


def global_average_multiplier(scale_x: np.float32, scale_y: np.float32, positions: int) -> np.float32:
    """M = f32(s_x / f32(s_y * n)) for the sum over n positions of (x - z_x), then requantize.

    0 of 7e5 outputs differ, over zero points on both sides and image sizes 1 to 14.
    """
    return np.float32(scale_x) / (np.float32(scale_y) * np.float32(positions))


def quantize_average(mean: Real, scale: np.float32, zero_point: int) -> Codes:
    """The last step of QLinearAveragePool: clamp(rint(f32(f32(x / s) + z))), the zero point added before rounding.

    0 of 4e6 outputs differ; with the zero point added after rounding, as QuantizeLinear does, 2e4 do.
    """
    steps: Real = mean / np.float32(scale) + np.float32(zero_point)
    np.clip(np.rint(steps, out=steps), 0, 255, out=steps)
    return steps.astype(np.uint8)
