"""What an IntegerGraph means, in plain numpy: the arithmetic onnxruntime does on x86, written from its formulas.

float32 throughout, round half to even, integer accumulators. It reads the graph and none of the emitted ONNX.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from mecdeploy.export.graph import Add, Conv, Gemm, GlobalAveragePool, IntegerGraph, MaxPool, Quantization

F32 = np.float32


def evaluate(graph: IntegerGraph, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Every value of the graph: uint8 codes [N, ...], and the float32 logits."""
    codes = {graph.input: pixels}
    for node in graph.nodes:
        if isinstance(node, Add):
            for output in node.outputs:
                codes[output] = _add(graph, node, output, codes)
        elif isinstance(node, Conv | Gemm):
            codes[node.output] = _weighted(graph, node, codes[node.input])
        elif isinstance(node, MaxPool):
            codes[node.output] = _max_pool(node, codes[node.input], graph.values[node.output].shape)
        elif isinstance(node, GlobalAveragePool):
            codes[node.output] = _mean(graph, node, codes[node.input])
        else:
            codes[node.output] = codes[node.input].reshape(len(pixels), -1)
    return codes


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


def _add(graph: IntegerGraph, node: Add, output: str, codes: dict[str, np.ndarray]) -> np.ndarray:
    left, right = (_quantization(graph, name) for name in node.inputs)
    target = _quantization(graph, output)
    ratio_left, ratio_right = F32(left.scale) / F32(target.scale), F32(right.scale) / F32(target.scale)
    offset = F32(target.zero_point) - (ratio_left * F32(left.zero_point) + ratio_right * F32(right.zero_point))
    inner = _fused_multiply_add(codes[node.inputs[1]], ratio_right, offset)
    total = np.rint(_fused_multiply_add(codes[node.inputs[0]], ratio_left, inner))
    return np.clip(total, 0, target.qmax).astype(np.uint8)


def _fused_multiply_add(codes: np.ndarray, ratio: np.float32, addend: np.ndarray) -> np.ndarray:
    """f32(codes * ratio + addend), rounded once: a code times a float32 is exact in float64, and so is the sum here."""
    return (codes.astype(np.float64) * np.float64(ratio) + np.asarray(addend, np.float64)).astype(F32)


def _max_pool(node: MaxPool, codes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros((len(codes), *shape), np.uint8)
    height, width = codes.shape[2:]
    for y, x in product(range(shape[1]), range(shape[2])):
        rows = y * node.stride[0] - node.padding[0] + node.dilation[0] * np.arange(node.kernel[0])
        columns = x * node.stride[1] - node.padding[1] + node.dilation[1] * np.arange(node.kernel[1])
        rows, columns = rows[(rows >= 0) & (rows < height)], columns[(columns >= 0) & (columns < width)]
        out[:, :, y, x] = codes[:, :, rows][:, :, :, columns].max(axis=(2, 3))
    return out


def _mean(graph: IntegerGraph, node: GlobalAveragePool, codes: np.ndarray) -> np.ndarray:
    source, target = _quantization(graph, node.input), _quantization(graph, node.output)
    positions = codes.shape[2] * codes.shape[3]
    total = (codes.astype(np.int64) - source.zero_point).sum(axis=(2, 3), keepdims=True)
    multiplier = F32(source.scale) / (F32(target.scale) * F32(positions))
    return _saturate(np.rint(total.astype(F32) * multiplier), target)


def _saturate(steps: np.ndarray, target: Quantization) -> np.ndarray:
    return np.clip(steps + target.zero_point, 0, target.qmax).astype(np.uint8)
