"""onnxruntime's integer kernels on x86-64, from their formulas: numpy integers, float32 scalars, exact fractions.

Slow and plain on purpose, and shares nothing with the training room. Stored codes are 0..qmax with a zero point.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np

F32 = np.float32


def round_to_float32(value: Fraction) -> np.float32:
    """The float32 nearest to a fraction, ties to even: one rounding, however long the fraction."""
    if value == 0:
        return F32(0)
    exponent = 0
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    ulp = Fraction(2) ** (max(exponent, -126) - 23)
    return F32(float(round(value / ulp) * ulp))


def fused_multiply_add(a: float, b: float, c: float) -> np.float32:
    """a * b + c, rounded once to float32."""
    return round_to_float32(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


def saturate(steps: np.ndarray, zero_point: int, qmax: int) -> np.ndarray:
    """Rounded steps to stored codes. Out-of-range values saturate, which is also the ReLU of a zero point of 0."""
    return np.clip(steps + zero_point, 0, qmax).astype(np.uint8)


def convolve(
    centred: np.ndarray,
    weight: np.ndarray,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> np.ndarray:
    """Integer cross-correlation [N, C, H, W] with [O, C / groups, kh, kw], one output position at a time."""
    centred, weight = centred.astype(np.int64), weight.astype(np.int64)
    padded = np.pad(centred, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    outs, ins, *kernel = weight.shape
    size = [(padded.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    result = np.zeros((len(centred), outs, *size), np.int64)
    for o, y, x in product(range(outs), *map(range, size)):
        first = o // (outs // groups) * ins
        rows = y * stride[0] + dilation[0] * np.arange(kernel[0])
        columns = x * stride[1] + dilation[1] * np.arange(kernel[1])
        window = padded[:, first : first + ins][:, :, rows][:, :, :, columns]
        result[:, o, y, x] = (window * weight[o]).sum((1, 2, 3))
    return result


def bias_codes(bias: np.ndarray, input_scale: float, weight_scale: np.ndarray) -> np.ndarray:
    """int32 bias at f32(s_x * s_w), [O]."""
    product_scale = (F32(input_scale) * weight_scale.astype(F32)).astype(F32)
    return np.rint((bias.astype(F32) / product_scale).astype(F32)).astype(np.int64)


def requantize(
    accumulator: np.ndarray, input_scale: float, weight_scale: np.ndarray, scale: float, zero_point: int, qmax: int
) -> np.ndarray:
    """QLinearConv and QGemm: M = f32(f32(s_x * s_w) / s_y); rint(f32(acc) * M). accumulator: integers [N, O, ...]."""
    codes = np.zeros(accumulator.shape, np.uint8)
    for o, weight_step in enumerate(weight_scale):
        product_scale = F32(input_scale) * F32(weight_step)
        multiplier = F32(product_scale / F32(scale))
        steps = accumulator[:, o].astype(F32) * multiplier
        steps = np.clip(steps, F32(-zero_point), F32(255 - zero_point))
        codes[:, o] = saturate(np.rint(steps), zero_point, qmax)
    return codes


def logits(accumulator: np.ndarray, input_scale: float, weight_scale: np.ndarray) -> np.ndarray:
    """QGemm with a float output: f32(acc) * f32(s_x * s_w), [N, O]."""
    return accumulator.astype(F32) * (F32(input_scale) * weight_scale.astype(F32)).astype(F32)


def add(
    a: np.ndarray, a_scale: float, a_zero: int, b: np.ndarray, b_scale: float, b_zero: int,
    scale: float, zero_point: int, qmax: int,
) -> np.ndarray:  # fmt: skip
    """QLinearAdd on stored codes: rint(fma(a, ra, fma(b, rb, zc))), ra = sa/sy, zc = zy - fma(ra, za, rb * zb)."""
    ratio_a, ratio_b = F32(a_scale) / F32(scale), F32(b_scale) / F32(scale)
    fixed = F32(zero_point) - fused_multiply_add(ratio_a, a_zero, ratio_b * F32(b_zero))
    sums = {}
    for pair in set(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)):
        total = fused_multiply_add(pair[0], ratio_a, fused_multiply_add(pair[1], ratio_b, fixed))
        sums[pair] = min(max(round(float(total)), 0), qmax)
    pairs = zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)
    return np.array([sums[pair] for pair in pairs], np.uint8).reshape(a.shape)


def global_average(
    codes: np.ndarray, input_scale: float, input_zero: int, scale: float, zero_point: int, qmax: int
) -> np.ndarray:
    """QLinearGlobalAveragePool on stored codes: rint(S * (sx / (sy * n))) + zy, S the sum of n centred codes."""
    count = codes.shape[2] * codes.shape[3]
    total = (codes.astype(np.int64) - input_zero).sum((2, 3), keepdims=True)
    multiplier = F32(input_scale) / (F32(scale) * F32(count))
    return saturate(np.rint(total.astype(F32) * multiplier), zero_point, qmax)


def max_pool(
    codes: np.ndarray,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, int],
) -> np.ndarray:
    """Maximum over windows, places outside the image left out. size: height and width of the result."""
    result = np.zeros((*codes.shape[:2], *size), np.uint8)
    height, width = codes.shape[2:]
    for y, x in product(*map(range, size)):
        rows = y * stride[0] - padding[0] + dilation[0] * np.arange(kernel[0])
        columns = x * stride[1] - padding[1] + dilation[1] * np.arange(kernel[1])
        rows, columns = rows[(rows >= 0) & (rows < height)], columns[(columns >= 0) & (columns < width)]
        result[:, :, y, x] = codes[:, :, rows][:, :, :, columns].max((2, 3))
    return result
