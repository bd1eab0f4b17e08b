"""onnxruntime's integer kernels on x86-64, from their formulas: numpy integers, float32 scalars, exact fractions.

Slow and plain on purpose, and shares nothing with the training room. Stored codes are 0..qmax with a zero point.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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


def multiply(
    a: np.ndarray, a_scale: float, a_zero: int, b: np.ndarray, b_scale: float, b_zero: int,
    scale: float, zero_point: int, qmin: int, qmax: int,
) -> np.ndarray:  # fmt: skip
    """QLinearMul on stored codes: rint(f32(f32(ab * M) + zy)), M = f32(f32(sa * sb) / sy); the zero point before."""
    product = (a.astype(np.int64) - a_zero) * (b.astype(np.int64) - b_zero)
    multiplier = F32(F32(a_scale) * F32(b_scale)) / F32(scale)
    steps = (product.astype(F32) * multiplier).astype(F32) + F32(zero_point)
    return np.clip(np.rint(steps), qmin, qmax).astype(np.uint8)


SIGMOID_NUMERATOR = ["4.37031012579801e-11", "1.15627324459942e-07", "6.08574864600143e-05", "8.51377133304701e-03",
                     "2.48287947061529e-01"]  # fmt: skip
SIGMOID_DENOMINATOR = ["6.10247389755681e-13", "5.76102136993427e-09", "6.29106785017040e-06", "1.70198817374094e-03",
                       "1.16817656904453e-01", "9.93151921023180e-01"]  # fmt: skip
"""Of x^9, x^7, ... x and of x^10, x^8, ... 1: the rational approximation that Eigen publishes."""


@functools.cache
def logistic(x: np.float32) -> np.float32:
    """onnxruntime's logistic function of one float32, every multiply-add an exact fraction rounded once."""
    x = F32(min(max(x, F32(-18)), F32(18)))
    square = F32(x * x)

    def polynomial(terms: list[str]) -> np.float32:
        total = F32(terms[0])
        for term in terms[1:]:
            total = fused_multiply_add(float(total), float(square), float(F32(term)))
        return total

    ratio = F32(F32(x * polynomial(SIGMOID_NUMERATOR)) / polynomial(SIGMOID_DENOMINATOR))
    return max(F32(ratio + F32(0.5)), F32(0))


def leaky(x: np.float32, alpha: float) -> np.float32:
    """LeakyRelu of one float32."""
    return x if x >= 0 else F32(F32(alpha) * x)


def through_table(
    codes: np.ndarray, input_scale: float, input_zero: int, function: Callable[[np.float32], np.float32],
    scale: float, zero_point: int, qmin: int, qmax: int,
) -> np.ndarray:  # fmt: skip
    """QLinearSigmoid and QLinearLeakyRelu: of each stored code rint(f32(y / sy)) + zy, y of f32(sx * (code - zx))."""
    table = np.zeros(256, np.uint8)
    for code in range(256):
        y = function(F32(F32(input_scale) * F32(code - input_zero)))
        table[code] = np.clip(np.rint(F32(y / F32(scale))) + zero_point, qmin, qmax)
    return table[codes]


def hard_sigmoid(codes: np.ndarray, input_scale: float, input_zero: int, scale: float, qmax: int) -> np.ndarray:
    """QLinearAdd of the codes at f32(sx / 6) and the constant 1 at scale 1/2; zero point 0."""
    sixth = F32(input_scale) / F32(6)
    return add(codes, float(sixth), input_zero, np.ones_like(codes), 0.5, 0, scale, 0, qmax)


def average_pool(
    codes: np.ndarray, input_scale: float, input_zero: int, kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], include_pad: bool, scale: float, zero_point: int, qmin: int, qmax: int,
) -> np.ndarray:  # fmt: skip
    """QLinearAveragePool: reals added row by row in float32; rint(f32(f32(mean / sy) + zy)), the zero point before."""
    images, channels, height, width = codes.shape
    rows = (height + 2 * padding[0] - kernel[0]) // stride[0] + 1
    columns = (width + 2 * padding[1] - kernel[1]) // stride[1] + 1
    result = np.zeros((images, channels, rows, columns), np.uint8)
    for n, c, y, x in product(range(images), range(channels), range(rows), range(columns)):
        total, inside = F32(0), 0
        for i, j in product(range(kernel[0]), range(kernel[1])):
            h, w = y * stride[0] - padding[0] + i, x * stride[1] - padding[1] + j
            if 0 <= h < height and 0 <= w < width:
                total = F32(total + F32(F32(input_scale) * F32(int(codes[n, c, h, w]) - input_zero)))
                inside += 1
        mean = F32(total / F32(kernel[0] * kernel[1] if include_pad else inside))
        result[n, c, y, x] = np.clip(np.rint(F32(F32(mean / F32(scale)) + F32(zero_point))), qmin, qmax)
    return result
