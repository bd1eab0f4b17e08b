"""More units for hand-made graphs: elementwise kernels, movement of codes, Gemms over rows, float islands.

Each is a function of a Builder. Zero points are where real 0 falls in the range, so any code, as learned ones are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from qdq_models import Builder, Tensor, to_logits


def shaped(
    build: Builder, name: str, shape: tuple[int, ...], bits: int, low: float, high: float, *, qmin: bool = False
) -> Tensor:
    """Codes for reals of about low..high, at a zero point that is where it falls, as learned ones are."""
    qmax = 2**bits - 1
    scale = build.scale((high - low) / qmax)
    zero_point = int(np.clip(round(-low / float(scale)), 0, qmax))
    return Tensor(name, shape, scale, zero_point, qmax, zero_point if qmin else 0)


def reach(x: Tensor) -> tuple[float, float]:
    """Smallest and largest real of a tensor."""
    return float(x.scale) * (x.qmin - x.zero_point), float(x.scale) * (x.qmax - x.zero_point)


def mul(build: Builder, name: str, a: Tensor, b: Tensor, *, bits: int = 8) -> Tensor:
    inputs = [build.dequantize(a, f"{name}.a"), build.dequantize(b, f"{name}.b")]
    corners = [first * second for first in reach(a) for second in reach(b)]
    shape = np.broadcast_shapes(a.shape, b.shape)
    y = shaped(build, name, shape, bits, 0.6 * min(corners), 0.6 * max(corners))  # so that some saturate
    return build.quantize(build.node("Mul", inputs, f"{name}/float"), y)


def sigmoid(build: Builder, name: str, x: Tensor, *, bits: int = 8) -> Tensor:
    y = shaped(build, name, x.shape, bits, 0.0, 0.9)
    return build.quantize(build.node("Sigmoid", [build.dequantize(x, name)], f"{name}/float"), y)


def leaky_relu(build: Builder, name: str, x: Tensor, alpha: float, *, bits: int = 8) -> Tensor:
    low, high = reach(x)
    y = shaped(build, name, x.shape, bits, 0.8 * alpha * low, 0.8 * high)
    real = build.node("LeakyRelu", [build.dequantize(x, name)], f"{name}/float", alpha=alpha)
    return build.quantize(real, y)


def hard_sigmoid(build: Builder, name: str, x: Tensor, *, bits: int = 8, constant_first: bool = True) -> Tensor:
    """clip(x / 6 + 1 / 2, 0, 1): the Add of the constant 1/2 and x's codes read at a sixth of their scale."""
    sixth = [x.name, build.constant(f"{name}/sixth/scale", x.scale / np.float32(6), np.float32), f"{x.name}/zero_point"]
    build.constant(f"{x.name}/zero_point", x.zero_point, np.uint8)
    half = [build.constant("half", 1, np.uint8), build.constant("half/scale", 0.5, np.float32)]
    half.append(build.constant("half/zero_point", 0, np.uint8))
    inputs = [build.node("DequantizeLinear", half, f"{name}/half")]
    inputs.append(build.node("DequantizeLinear", sixth, f"{name}/sixth"))
    real = build.node("Add", inputs if constant_first else inputs[::-1], f"{name}/float")
    y = Tensor(name, x.shape, np.float32(1) / np.float32(2**bits - 1), 0, 2**bits - 1)
    return build.quantize(real, y)


# ---- movement ---------------------------------------------------------------------------------------------------


def reshape(build: Builder, name: str, x: Tensor, shape: Sequence[int]) -> Tensor:
    build.node("Reshape", [x.name, build.constant(f"{name}/shape", [-1, *shape], np.int64)], name)
    return build.unit(Tensor(name, tuple(shape), x.scale, x.zero_point, x.qmax, x.qmin))


def transpose(build: Builder, name: str, x: Tensor, order: Sequence[int]) -> Tensor:
    build.node("Transpose", [x.name], name, perm=order)
    return build.unit(Tensor(name, tuple(x.shape[axis - 1] for axis in order[1:]), x.scale, x.zero_point, x.qmax))


def cut(build: Builder, name: str, x: Tensor, axis: int, start: int, stop: int, step: int = 1) -> Tensor:
    limits = [build.constant(f"{name}/{i}", [value], np.int64) for i, value in enumerate((start, stop, axis, step))]
    build.node("Slice", [x.name, *limits], name)
    shape = list(x.shape)
    shape[axis - 1] = len(range(shape[axis - 1])[start:stop:step])
    return build.unit(Tensor(name, tuple(shape), x.scale, x.zero_point, x.qmax))


def concat(build: Builder, name: str, xs: Sequence[Tensor], axis: int = 1) -> Tensor:
    build.node("Concat", [x.name for x in xs], name, axis=axis)
    shape = list(xs[0].shape)
    shape[axis - 1] = sum(x.shape[axis - 1] for x in xs)
    qmax = max(x.qmax for x in xs)
    return build.unit(Tensor(name, tuple(shape), xs[0].scale, xs[0].zero_point, qmax))


def same_scale(build: Builder, name: str, x: Tensor, like: Tensor, *, bits: int, relu: bool = False) -> Tensor:
    """A 1x1 convolution whose output has the scale and zero point of another tensor, maybe held at its ReLU."""
    inputs, _ = build.product_inputs(name, x, (like.shape[0], x.shape[0], 1, 1), "int8", True, True, axis=0)
    y = Tensor(name, like.shape, like.scale, like.zero_point, 2**bits - 1, like.zero_point if relu else 0)
    for part in ("scale", "zero_point"):
        build.initializers[f"{name}/{part}"] = build.initializers[f"{like.name}/{part}"]
    return build.quantize(build.node("Conv", inputs, f"{name}/float"), y)


# ---- rows and islands -------------------------------------------------------------------------------------------


def gemm_rows(build: Builder, name: str, x: Tensor, features: int, *, real: bool = False, bits: int = 8) -> Tensor:
    """A Gemm over the last axis of [..., I]; real: its output stays float32, for an island."""
    rows = Tensor(f"{name}/rows", (x.shape[-1],), x.scale, x.zero_point, x.qmax)
    build.node("Reshape", [x.name, build.constant(f"{name}/rows/shape", [-1, x.shape[-1]], np.int64)], rows.name)
    inputs, spread = build.product_inputs(name, rows, (features, x.shape[-1]), "int8", True, True, axis=0)
    shape = (*x.shape[:-1], features)
    back = build.constant(f"{name}/shape", [-1, *shape], np.int64)
    if real:
        build.node("Reshape", [build.node("Gemm", inputs, f"{name}/float", transB=1), back], name)
        return build.unit(Tensor(name, shape, np.float32(0), 0, 0))
    flat = build.output(f"{name}/flat", (features,), bits, True, spread)
    build.quantize(build.node("Gemm", inputs, f"{name}/float", transB=1), flat)
    build.units.remove(flat.name)  # its integers are those of the Reshape behind it
    build.activation_bits.pop(flat.name)
    build.node("Reshape", [flat.name, back], name)
    return build.unit(Tensor(name, shape, flat.scale, flat.zero_point, flat.qmax))


class IslandBuilder:
    """Writes the float nodes of one island, each named `<island>/...`."""

    def __init__(self, build: Builder, name: str, operators: Sequence[str]) -> None:
        self.build, self.name = build, name
        build.islands[name] = {"operators": list(operators), "reason": "onnxruntime has no integer kernel for them"}

    def node(self, op: str, inputs: Sequence[str], output: str, *, value: bool = False, **attributes: Any) -> str:
        """One node; value: its output is named as it is, and leaves the island."""
        inner = f"{self.name}/{output}"
        made = onnx.helper.make_node(op, list(inputs), [output if value else inner], name=inner, **attributes)
        self.build.nodes.append(made)
        return made.output[0]

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        return self.build.constant(f"{self.name}/{name}", value, dtype)


def quantize_float(build: Builder, real: str, y: Tensor) -> Tensor:
    """QuantizeLinear (-> Clip) of a float value: a point where onnxruntime's codes are handed on."""
    build.float_values.append(y.name)
    return build.quantize(real, y)


# ---- networks ---------------------------------------------------------------------------------------------------


def mobile_network(seed: int = 0, *, dyadic: bool = False, channels: int = 11, width: int = 6) -> onnx.ModelProto:
    """Every elementwise kernel and every movement: squeeze and excite, swish, hard swish, dense blocks, a shuffle."""
    build = Builder(np.random.default_rng(seed), dyadic=dyadic)
    x = build.pixels((3, 7, width))
    stem = build.conv("stem", x, channels, bits=8, signed=True)
    swish = mul(build, "swish", stem, sigmoid(build, "gate", stem), bits=8)
    mean = build.pool("GlobalAveragePool", "squeeze", swish)
    reduced = build.conv("reduce", mean, 5, (1, 1), pads=(0, 0, 0, 0), bits=4)
    excite = build.conv("excite", reduced, channels, (1, 1), pads=(0, 0, 0, 0), bits=8, signed=True)
    excited = mul(build, "excited", hard_sigmoid(build, "hard", excite, bits=4), swish, bits=8)
    hard = mul(build, "hardswish", excited, hard_sigmoid(build, "hard2", excited), bits=4)
    leaky = leaky_relu(build, "leaky", build.conv("wide", hard, channels, bits=8, signed=True), 0.1, bits=8)
    side = same_scale(build, "side", leaky, leaky, bits=8, relu=True)
    dense = concat(build, "dense", [leaky, side])
    smooth = {"kernel_shape": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1), "count_include_pad": 1}
    average = build.pool("AveragePool", "average", dense, signed=True, **smooth)
    pairs = reshape(build, "pairs", average, (2, channels, *average.shape[1:]))
    turned = transpose(build, "turned", pairs, (0, 2, 1, 3, 4))
    shuffled = reshape(build, "shuffled", turned, average.shape)
    low = cut(build, "low", shuffled, 1, 0, channels)
    high = cut(build, "high", shuffled, 1, channels, 2 * channels)
    relu = leaky_relu(build, "relu", high, 0.0, bits=4)
    last = build.conv("last", relu, channels, bits=8, signed=True)
    return to_logits(build, x, build.add("sum", low, last, signed=True))


def token_network(seed: int = 0, *, head: str = "gemm", tokens: tuple[int, int] = (3, 4)) -> onnx.ModelProto:
    """A transformer's pieces: layer norm, attention over a float Gemm's rows, a pooled head.

    head: gemm, where the logits are an integer Gemm's; or island, where a float island makes them.
    """
    build = Builder(np.random.default_rng(seed))
    x = build.pixels((3, *tokens))
    width, length = 8, tokens[0] * tokens[1]
    patches = build.conv("patches", x, width, (1, 1), pads=(0, 0, 0, 0), bits=8, signed=True)
    sequence = transpose(build, "sequence", reshape(build, "flat", patches, (width, length)), (0, 2, 1))

    norm = IslandBuilder(build, "norm", ["layer_norm"])
    gain = norm.constant("gain", build.rng.uniform(0.5, 1.5, width))
    shift = norm.constant("shift", build.rng.normal(0, 0.3, width))
    normed = norm.node("LayerNormalization", [build.dequantize(sequence, "norm"), gain, shift], "normed", value=True)
    y = quantize_float(build, normed, shaped(build, "normed/codes", sequence.shape, 8, -3.0, 3.0))

    both = gemm_rows(build, "both", y, 2 * width, real=True)
    gate = IslandBuilder(build, "gate", ["chunk", "softmax", "mul", "mean"])
    halves = []
    for half, start in (("first", 0), ("second", width)):
        limits = [gate.constant(f"{half}/{i}", [at], np.int64) for i, at in enumerate((start, start + width, 2))]
        halves.append(gate.node("Slice", [both.name, *limits], half))
    scaled = gate.node("Mul", [halves[0], gate.constant("sharpness", 20.0)], "scaled")
    weights = gate.node("Softmax", [scaled], "softmax", axis=-1)
    gated = gate.node("Mul", [weights, halves[1]], "product")
    pooled = gate.node("ReduceMean", [gated, gate.constant("axis", [1], np.int64)], "pooled", value=True, keepdims=0)
    # 4 bits: a Clip behind the QuantizeLinear
    z = quantize_float(build, pooled, shaped(build, "pooled/codes", (width,), 4, -0.02, 0.02))
    if head == "gemm":
        return build.model(x, build.gemm("classifier", z, 5, to_logits=True))
    end = IslandBuilder(build, "head", ["linear"])
    matrix = end.constant("matrix", build.rng.normal(0, 1, (width, 5)))
    end.node("MatMul", [build.dequantize(z, "head"), matrix], "logits", value=True)
    return build.model(x, Tensor("logits", (5,), np.float32(0), 0, 0))
