"""What an IntegerGraph means, in plain numpy: the arithmetic onnxruntime does on x86, written from its formulas.

float32 throughout, round half to even, integer accumulators. It reads the graph and none of the emitted ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np

from mecdeploy.export.graph import (
    Add,
    AveragePool,
    Concat,
    Conv,
    Dequantize,
    Elementwise,
    Flatten,
    FloatIsland,
    Gemm,
    GlobalAveragePool,
    IntegerGraph,
    MaxPool,
    Node,
    Quantization,
    Quantize,
    Reshape,
    Slice,
    Transpose,
)

F32 = np.float32
Codes = dict[str, np.ndarray]
NUMERATOR = (
    4.37031012579801e-11,
    1.15627324459942e-07,
    6.08574864600143e-05,
    8.51377133304701e-03,
    2.48287947061529e-01,
)
DENOMINATOR = (
    6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06, 1.70198817374094e-03, 1.16817656904453e-01,
    9.93151921023180e-01,
)  # fmt: skip
"""Eigen's published coefficients of the logistic function, highest power of x^2 first; see _sigmoid."""


def evaluate(graph: IntegerGraph, pixels: np.ndarray, given: Mapping[str, np.ndarray] | None = None) -> Codes:
    """Every value that integers make: uint8 codes [N, ...], and the float32 outputs of Gemms.

    given: the codes of what a float island made, which this witness does not compute.
    """
    codes = {graph.input: pixels}
    for node in graph.nodes:
        if isinstance(node, FloatIsland):
            continue
        if isinstance(node, Quantize):
            assert given is not None
            codes[node.output] = given[node.output]
        elif isinstance(node, Add):
            for output in node.outputs:
                codes[output] = _add(graph, node, output, codes)
        else:
            codes[node.output] = _evaluate(graph, node, codes)
    return codes


def _evaluate(graph: IntegerGraph, node: Node, codes: Codes) -> np.ndarray:
    match node:
        case Conv() | Gemm():
            # a Gemm works on the last axis, wherever the images stand
            return _weighted(graph, node, codes[node.input])
        case MaxPool():
            return _max_pool(node, codes[node.input], graph.values[node.output].shape)
        case GlobalAveragePool():
            return _mean(graph, node, codes[node.input])
        case AveragePool():
            whole = node.kernel == codes[node.input].shape[2:] and not any(node.padding)
            return (_mean if whole else _window_means)(graph, node, codes[node.input])
        case Elementwise():
            return _elementwise(graph, node, codes)
        case Flatten() | Reshape():
            return codes[node.input].reshape(-1, *graph.values[node.output].shape)
        case Transpose():
            return codes[node.input].transpose(node.permutation)
        case Slice():
            places = range(node.start, node.stop, node.step)
            return codes[node.input].take(places, axis=node.axis)
        case Concat():
            return np.concatenate([codes[name] for name in node.inputs], axis=node.axis)
        case Dequantize():
            return _reals(codes[node.input], _quantization(graph, node.input))
    raise AssertionError(node)


def _quantization(graph: IntegerGraph, name: str) -> Quantization:
    quantization = graph.values[name].quantization
    assert quantization is not None
    return quantization


def _weighted(graph: IntegerGraph, node: Conv | Gemm, codes: np.ndarray) -> np.ndarray:
    source = _quantization(graph, node.input)
    centred = codes.astype(np.int64) - source.zero_point
    if isinstance(node, Gemm):
        accumulator = centred @ node.weight.codes.astype(np.int64).T + node.bias
    else:
        accumulator = _convolve(node, centred, graph.values[node.output].shape) + node.bias[:, None, None]
    product_scale = (F32(source.scale) * node.weight.scale).astype(F32)
    if isinstance(node, Conv):
        product_scale = product_scale[:, None, None]
    target = graph.values[node.output].quantization
    if target is None:
        return accumulator.astype(F32) * product_scale
    multiplier = (product_scale / F32(target.scale)).astype(F32)
    # the kernel saturates at uint8 before and the Clip at qmax after rounding; both are monotonic, so once is enough
    return _saturate(np.rint(accumulator.astype(F32) * multiplier), target)


def _convolve(node: Conv, centred: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Exact integer cross-correlation, one kernel position at a time, one group at a time."""
    top, left, bottom, right = node.padding
    padded = np.pad(centred, ((0, 0), (0, 0), (top, bottom), (left, right)))
    out = np.zeros((len(centred), *shape), np.int64)
    outs, ins = shape[0] // node.groups, node.weight.codes.shape[1]
    for group, i, j in product(range(node.groups), *map(range, node.weight.codes.shape[2:])):
        rows = i * node.dilation[0] + node.stride[0] * np.arange(shape[1])
        columns = j * node.dilation[1] + node.stride[1] * np.arange(shape[2])
        patch = padded[:, group * ins : (group + 1) * ins][:, :, rows][:, :, :, columns]
        kernel = node.weight.codes[group * outs : (group + 1) * outs, :, i, j].astype(np.int64)
        out[:, group * outs : (group + 1) * outs] += np.einsum("oi,nihw->nohw", kernel, patch)
    return out


def _add(graph: IntegerGraph, node: Add, output: str, codes: Codes) -> np.ndarray:
    left, right = (_quantization(graph, name) for name in node.inputs)
    target = _quantization(graph, output)
    return _sum(codes[node.inputs[0]], left, codes[node.inputs[1]], right, target)


def _sum(a: np.ndarray, left: Quantization, b: np.ndarray, right: Quantization, target: Quantization) -> np.ndarray:
    ratio_left, ratio_right = F32(left.scale) / F32(target.scale), F32(right.scale) / F32(target.scale)
    offset = F32(target.zero_point) - _fma(ratio_left, F32(left.zero_point), ratio_right * F32(right.zero_point))
    total = np.rint(_fma(a, ratio_left, _fma(b, ratio_right, offset)))
    return np.clip(total, target.qmin, target.qmax).astype(np.uint8)


def _fma(a: np.ndarray | F32, b: np.ndarray | F32, c: np.ndarray | F32) -> np.ndarray:
    """f32(a * b + c), rounded once: the product is exact in an extended double, and the sum is rounded far below."""
    wide = np.longdouble
    return (np.asarray(a, wide) * np.asarray(b, wide) + np.asarray(c, wide)).astype(F32)


def _elementwise(graph: IntegerGraph, node: Elementwise, codes: Codes) -> np.ndarray:
    first, target = _quantization(graph, node.inputs[0]), _quantization(graph, node.output)
    x = codes[node.inputs[0]]
    if node.kind == "mul":
        second = _quantization(graph, node.inputs[1])
        products = (x.astype(int) - first.zero_point) * (codes[node.inputs[1]].astype(int) - second.zero_point)
        multiplier = F32(first.scale) * F32(second.scale) / F32(target.scale)
        # the zero point goes in before the rounding
        steps = products.astype(F32) * multiplier + F32(target.zero_point)
        return np.clip(np.rint(steps), target.qmin, target.qmax).astype(np.uint8)
    if node.kind == "hard_sigmoid":
        sixth = Quantization(scale=float(F32(first.scale) / F32(6)), zero_point=first.zero_point, qmax=255)
        one, half = np.array(1, np.uint8), Quantization(scale=0.5, zero_point=0, qmax=255)
        return _sum(x, sixth, one, half, target)
    reals = _reals(x, first)
    made = {"sigmoid": _sigmoid, "leaky_relu": lambda reals: np.where(reals >= 0, reals, F32(node.alpha) * reals)}
    return _saturate(np.rint(made[node.kind](reals) / F32(target.scale)), target)


def _reals(codes: np.ndarray, source: Quantization) -> np.ndarray:
    return (codes.astype(F32) - F32(source.zero_point)) * F32(source.scale)


def _sigmoid(reals: np.ndarray) -> np.ndarray:
    """A quotient of two polynomials in x^2, each evaluated with fused multiply-adds."""
    x = np.clip(reals, F32(-18), F32(18))
    square = x * x

    def polynomial(coefficients: tuple[float, ...]) -> np.ndarray:
        value = np.full_like(x, coefficients[0])
        for coefficient in coefficients[1:]:
            value = _fma(value, square, F32(coefficient))
        return value

    return np.maximum(x * polynomial(NUMERATOR) / polynomial(DENOMINATOR) + F32(0.5), 0)


def _max_pool(node: MaxPool, codes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros((len(codes), *shape), np.uint8)
    height, width = codes.shape[2:]
    for y, x in product(range(shape[1]), range(shape[2])):
        rows = y * node.stride[0] - node.padding[0] + node.dilation[0] * np.arange(node.kernel[0])
        columns = x * node.stride[1] - node.padding[1] + node.dilation[1] * np.arange(node.kernel[1])
        rows, columns = rows[(rows >= 0) & (rows < height)], columns[(columns >= 0) & (columns < width)]
        out[:, :, y, x] = codes[:, :, rows][:, :, :, columns].max(axis=(2, 3))
    return out


def _mean(graph: IntegerGraph, node: GlobalAveragePool | AveragePool, codes: np.ndarray) -> np.ndarray:
    source, target = _quantization(graph, node.input), _quantization(graph, node.output)
    positions = codes.shape[2] * codes.shape[3]
    total = (codes.astype(np.int64) - source.zero_point).sum(axis=(2, 3), keepdims=True)
    multiplier = F32(source.scale) / (F32(target.scale) * F32(positions))
    return _saturate(np.rint(total.astype(F32) * multiplier), target)


def _window_means(graph: IntegerGraph, node: AveragePool, codes: np.ndarray) -> np.ndarray:
    """Float32 sums, place by place, row by row; the zero point goes in before the rounding."""
    source, target = _quantization(graph, node.input), _quantization(graph, node.output)
    top, left, bottom, right = node.padding
    sides = ((0, 0), (0, 0), (top, bottom), (left, right))
    reals = np.pad(_reals(codes, source), sides)
    inside = np.pad(np.ones_like(codes, F32), sides, constant_values=float(node.count_include_pad))
    total, count = (np.zeros((len(codes), *graph.values[node.output].shape), F32) for _ in range(2))
    rows, columns = (node.stride[axis] * np.arange(total.shape[2 + axis]) for axis in (0, 1))
    for i, j in product(*map(range, node.kernel)):
        total += reals[:, :, rows + i][:, :, :, columns + j]
        count += inside[:, :, rows + i][:, :, :, columns + j]
    steps = total / count / F32(target.scale) + F32(target.zero_point)
    return np.clip(np.rint(steps), target.qmin, target.qmax).astype(np.uint8)


def _saturate(steps: np.ndarray, target: Quantization) -> np.ndarray:
    return np.clip(steps + target.zero_point, target.qmin, target.qmax).astype(np.uint8)
