"""Integer kernels on stored uint8 codes: convolution, matrix product and pooling.

Sums of integer products are taken by the BLAS on integer-valued floats: exact in float32 while no partial sum can reach
2**24, in float64 beyond. Padding is with real zero, that is with the zero point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecdeploy.runtime_checks.arithmetic import EXACT_IN_FLOAT32, INT32_LIMIT, Codes, Real, quantize_average

Integers = NDArray[np.floating]

_WEIGHTS_AT_ONCE = 2**20
"""Of a Gemm, as floats: 4 or 8 MB."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Geometry of a sliding window over [H, W]. pads: top, left, bottom, right."""

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Positions of the window; with ceil_mode the last one may overhang but must start inside the padded input."""
        sizes = []
        for axis, size in enumerate((height, width)):
            head, tail = self.pads[axis], self.pads[axis + 2]
            stride = self.strides[axis]
            room = size + head + tail - (self.dilations[axis] * (self.kernel[axis] - 1) + 1)
            count = (-(-room // stride) if self.ceil_mode else room // stride) + 1
            if self.ceil_mode and (count - 1) * stride >= size + head:
                count -= 1
            sizes.append(count)
        return sizes[0], sizes[1]

    def pad(self, x: NDArray[Any], fill: float) -> NDArray[Any]:
        """[N, C, H, W] with the pads, and the overhang of ceil_mode, filled."""
        height, width = x.shape[2:]
        positions = self.output_size(height, width)
        extra = []
        for axis, size in enumerate((height, width)):
            reach = (positions[axis] - 1) * self.strides[axis] + self.dilations[axis] * (self.kernel[axis] - 1) + 1
            extra.append((self.pads[axis], max(self.pads[axis + 2], reach - size - self.pads[axis])))
        if extra == [(0, 0), (0, 0)]:
            return x
        return np.pad(x, ((0, 0), (0, 0), *extra), constant_values=fill)

    def taps(self, padded: NDArray[Any], positions: tuple[int, int]) -> list[NDArray[Any]]:
        """One strided view [N, C, oh, ow] per kernel position, row by row."""
        views = []
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                top, left = i * self.dilations[0], j * self.dilations[1]
                bottom = top + (positions[0] - 1) * self.strides[0] + 1
                right = left + (positions[1] - 1) * self.strides[1] + 1
                views.append(padded[:, :, top : bottom : self.strides[0], left : right : self.strides[1]])
        return views


def _exact_type(
    x: Codes, zero_point: int, weight: NDArray[np.int8], bias: NDArray[np.int32] | None
) -> tuple[type[np.floating], int]:
    """The float type in which every partial sum is exact, and the bound on |accumulator| that decided it."""
    reach = max(abs(int(x.max(initial=0)) - zero_point), abs(int(x.min(initial=255)) - zero_point)) if x.size else 0
    magnitudes = np.abs(weight, dtype=np.int16).reshape(weight.shape[0], -1)  # |-128| is no int8
    bound = magnitudes.sum(axis=1, dtype=np.int64) * reach
    if bias is not None:
        bound = bound + np.abs(bias.astype(np.int64))
    largest = int(bound.max(initial=0))
    return (np.float32 if largest < EXACT_IN_FLOAT32 else np.float64), largest


def _as_int32(accumulator: Integers, bound: int) -> Integers:
    """Wrap where int32 would: onnxruntime's accumulators do not saturate."""
    if bound < INT32_LIMIT:
        return accumulator
    return accumulator.astype(np.int64).astype(np.int32).astype(np.float64)


def _columns(window: Window, padded: NDArray[Any], positions: tuple[int, int]) -> NDArray[Any]:
    """im2col of one padded image [1, C, H, W]: [C * kh * kw, oh * ow]."""
    taps = window.taps(padded, positions)
    if len(taps) == 1 and positions == padded.shape[2:]:  # 1x1: the image is its own columns
        return padded.reshape(padded.shape[1], -1)
    columns = np.empty((padded.shape[1], len(taps), *positions), padded.dtype)
    for k, tap in enumerate(taps):
        columns[:, k] = tap[0]
    return columns.reshape(-1, positions[0] * positions[1])


def _convolve_depthwise(
    padded: Integers, weights: Integers, window: Window, positions: tuple[int, int], out: Integers
) -> None:
    """Every channel of one padded image [1, C, H, W] with its own kernels, tap by tap; weights, out: [O, ...]."""
    repeats = len(weights) // padded.shape[1]
    product = np.empty_like(out)
    out[...] = 0
    for tap, weight in zip(window.taps(padded, positions), weights.reshape(len(weights), -1).T, strict=True):
        channels = np.repeat(tap[0], repeats, axis=0) if repeats > 1 else tap[0]
        out += np.multiply(channels, weight[:, None, None], out=product)


def convolve(
    x: Codes,
    zero_point: int,
    weight: NDArray[np.int8],
    bias: NDArray[np.int32] | None,
    window: Window,
    groups: int,
) -> Integers:
    """int32 accumulators of a convolution, as exact floats [N, O, oh, ow]. weight: [O, C / groups, kh, kw].

    Image by image: what one needs stays in the processor's cache.
    """
    kind, bound = _exact_type(x, zero_point, weight, bias)
    positions = window.output_size(*x.shape[2:])
    outputs = weight.shape[0]
    depthwise = groups == x.shape[1] and weight.shape[1] == 1
    weights = weight.astype(kind)
    accumulator = np.empty((len(x), outputs, *positions), kind)
    for image, out in zip(x, accumulator, strict=True):
        padded = window.pad(np.subtract(image[None], zero_point, dtype=kind), 0)
        if depthwise:
            _convolve_depthwise(padded, weights, window, positions, out)
        else:
            columns = _columns(window, padded, positions).reshape(groups, -1, positions[0] * positions[1])
            matrices = weights.reshape(groups, outputs // groups, -1)
            np.matmul(matrices, columns, out=out.reshape(groups, outputs // groups, -1))
        if bias is not None:
            out += bias.astype(kind)[:, None, None]
    return _as_int32(accumulator, bound)


def matrix_product(x: Codes, zero_point: int, weight: NDArray[np.int8], bias: NDArray[np.int32] | None) -> Integers:
    """int32 accumulators of x @ weight.T + bias as exact floats [N, O]. x: [N, I], weight: [O, I].

    Some outputs at a time: all weights of a large classifier as floats are hundreds of megabytes.
    """
    kind, bound = _exact_type(x, zero_point, weight, bias)
    centred: Integers = np.subtract(x, zero_point, dtype=kind)
    accumulator: Integers = np.empty((len(x), len(weight)), kind)
    block = max(1, _WEIGHTS_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), block):
        accumulator[:, start : start + block] = centred @ weight[start : start + block].astype(kind).T
    if bias is not None:
        accumulator += bias.astype(kind)
    return _as_int32(accumulator, bound)


def global_sum(x: Codes, zero_point: int) -> Integers:
    """Sum over positions of (x - zero_point): [N, C, H, W] -> [N, C, 1, 1], exact."""
    total: Integers = x.sum(axis=(2, 3), keepdims=True, dtype=np.float64)
    total -= zero_point * x.shape[2] * x.shape[3]
    return total


def max_pool(x: Codes, window: Window) -> Codes:
    """Largest stored code per window; padding never wins, as 0 is the smallest code."""
    padded = window.pad(x, 0)
    first, *rest = window.taps(padded, window.output_size(*x.shape[2:]))
    largest = first.astype(np.uint8)
    for view in rest:
        np.maximum(largest, view, out=largest)
    return largest


def average_pool(
    x: Codes, scale_x: np.float32, zero_x: int, window: Window, include_pad: bool, scale_y: np.float32, zero_y: int
) -> Codes:
    """QLinearAveragePool: dequantise, add in float32 row by row, divide by the number of positions, quantise."""
    real = np.subtract(x, zero_x, dtype=np.float32) * np.float32(scale_x)
    positions = window.output_size(*x.shape[2:])
    total: Real = np.zeros((*x.shape[:2], *positions), np.float32)
    for view in window.taps(window.pad(real, 0), positions):
        total += view
    inside = window.pad(np.ones((1, 1, *x.shape[2:]), np.float32), 1.0 if include_pad else 0.0)
    count = np.sum(window.taps(inside, positions), axis=0, dtype=np.float32)
    return quantize_average(total / count, scale_y, zero_y)
