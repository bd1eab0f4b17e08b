"""ONNX models written node by node with onnx.helper: the graphs these tests check, made without the export room."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from qdq_storage import STORED_BITS, store


@dataclass(frozen=True)
class Tensor:
    """A tensor of stored codes: shape without the batch."""

    name: str
    shape: tuple[int, ...]
    scale: np.float32
    zero_point: int
    qmax: int
    qmin: int = 0


@dataclass
class Builder:
    """Collects one graph. Scales are given or drawn so that outputs use their range, and saturate here and there."""

    rng: np.random.Generator
    dyadic: bool = False
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    units: list[str] = field(default_factory=list)
    activation_bits: dict[str, int] = field(default_factory=dict)
    weight_bits: dict[str, int] = field(default_factory=dict)
    float_values: list[str] = field(default_factory=list)
    islands: dict[str, Any] = field(default_factory=dict)
    has_int2: bool = False

    # ---- pieces -------------------------------------------------------------------------------------------------

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: Any, dtype: Any = None) -> str:
        self.initializers[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def scale(self, around: float) -> np.float32:
        """A scale of that size: irregular, or a power of two, which makes exact ties common."""
        if self.dyadic:
            return np.float32(2.0 ** np.rint(np.log2(around)))
        return np.float32(around * self.rng.uniform(0.7, 1.4))

    def pixels(self, shape: tuple[int, int, int], zero_point: int = 118) -> Tensor:
        x = Tensor("pixels", shape, self.scale(1 / 64), zero_point, 255)
        self._parameters(x)
        return x

    def dequantize(self, x: Tensor, reader: str) -> str:
        return self.node("DequantizeLinear", [x.name, *self._parameters(x)], f"{x.name}/real.{reader}")

    def quantize(self, real: str, y: Tensor) -> Tensor:
        name = y.name if (y.qmin, y.qmax) == (0, 255) else f"{y.name}/unclipped"
        self.node("QuantizeLinear", [real, *self._parameters(y)], name)
        if name != y.name:
            low = self.constant(f"{y.name}/qmin", y.qmin, np.uint8) if y.qmin else ""
            high = self.constant(f"{y.name}/qmax", y.qmax, np.uint8) if y.qmax != 255 else ""
            self.node("Clip", [name, low, high], y.name)
        return self.unit(y)

    def unit(self, y: Tensor) -> Tensor:
        """List the tensor among those compared."""
        self.units.append(y.name)
        self.activation_bits[y.name] = y.qmax.bit_length()
        return y

    def _parameters(self, x: Tensor) -> list[str]:
        return [
            self.constant(f"{x.name}/scale", x.scale, np.float32),
            self.constant(f"{x.name}/zero_point", x.zero_point, np.uint8),
        ]

    def output(self, name: str, shape: tuple[int, ...], bits: int, signed: bool, spread: float) -> Tensor:
        """Codes whose range is a little too small for a standard deviation of `spread`, so that some saturate."""
        qmax = 2**bits - 1
        return Tensor(name, shape, self.scale(2.0 * spread / (qmax + 1)), 2 ** (bits - 1) if signed else 0, qmax)

    # ---- units --------------------------------------------------------------------------------------------------

    def conv(
        self,
        name: str,
        x: Tensor,
        channels: int,
        kernel: tuple[int, int] = (3, 3),
        *,
        storage: str = "int8",
        bits: int = 8,
        signed: bool = False,
        strides: tuple[int, int] = (1, 1),
        pads: tuple[int, int, int, int] = (1, 1, 1, 1),
        dilations: tuple[int, int] = (1, 1),
        groups: int = 1,
        per_channel: bool = True,
        bias: bool = True,
    ) -> Tensor:
        weight_shape = (channels, x.shape[0] // groups, *kernel)
        inputs, spread = self.product_inputs(name, x, weight_shape, storage, per_channel, bias, axis=0)
        sizes = [
            (size + pads[i] + pads[i + 2] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1
            for i, size in enumerate(x.shape[1:])
        ]
        real = self.node("Conv", inputs, f"{name}/float", strides=strides, pads=pads, dilations=dilations, group=groups)
        return self.quantize(real, self.output(name, (channels, *sizes), bits, signed, spread))

    def gemm(
        self, name: str, x: Tensor, features: int, *, storage: str = "int8", bits: int = 8, per_channel: bool = True,
        transposed: bool = True, to_logits: bool = False, signed: bool = False,
    ) -> Tensor:  # fmt: skip
        shape = (features, x.shape[0]) if transposed else (x.shape[0], features)
        axis = 0 if transposed else 1
        inputs, spread = self.product_inputs(name, x, shape, storage, per_channel, True, axis)
        if to_logits:
            self.node("Gemm", inputs, "logits", transB=int(transposed))
            return Tensor("logits", (features,), np.float32(0), 0, 0)
        real = self.node("Gemm", inputs, f"{name}/float", transB=int(transposed))
        return self.quantize(real, self.output(name, (features,), bits, signed, spread))

    def add(self, name: str, a: Tensor, b: Tensor, *, bits: int = 8, signed: bool = False) -> Tensor:
        inputs = [self.dequantize(a, f"{name}.a"), self.dequantize(b, f"{name}.b")]
        spread = float(np.hypot(a.scale * a.qmax, b.scale * b.qmax)) / 3
        real = self.node("Add", inputs, f"{name}/float")
        return self.quantize(real, self.output(name, a.shape, bits, signed, spread))

    def pool(self, op: str, name: str, x: Tensor, bits: int = 8, signed: bool = False, **attributes: Any) -> Tensor:
        """GlobalAveragePool or AveragePool between DequantizeLinear and QuantizeLinear."""
        shape = (x.shape[0], 1, 1) if op == "GlobalAveragePool" else _pooled(x.shape, **attributes)
        real = self.node(op, [self.dequantize(x, name)], f"{name}/float", **attributes)
        return self.quantize(real, self.output(name, shape, bits, signed, float(x.scale) * x.qmax / 4))

    def move(self, op: str, name: str, x: Tensor, *, through_real: bool = False, **attributes: Any) -> Tensor:
        """MaxPool, Flatten or Reshape: directly on the codes, or between DequantizeLinear and QuantizeLinear."""
        shape = _pooled(x.shape, **attributes) if op == "MaxPool" else (int(np.prod(x.shape)),)
        y = Tensor(name, shape, x.scale, x.zero_point, 255 if through_real else x.qmax)
        shapes = [self.constant(f"{name}/shape", [0, -1], np.int64)] if op == "Reshape" else []
        if through_real:
            return self.quantize(self.node(op, [self.dequantize(x, name), *shapes], f"{name}/float", **attributes), y)
        self.node(op, [x.name, *shapes], name, **attributes)
        return self.unit(y)

    def product_inputs(
        self, name: str, x: Tensor, shape: tuple[int, ...], storage: str, per_channel: bool, bias: bool, axis: int
    ) -> tuple[list[str], float]:
        """The reals of x, the weight and the bias, and the standard deviation to expect of the product."""
        bits = STORED_BITS[storage]
        channels = shape[axis]
        low = -(2 ** (bits - 1))
        # 7 bits of the 8: safe from int16 saturation on a CPU without VNNI
        codes = self.rng.integers(low // 2 if bits == 8 else low, (-low) // 2 if bits == 8 else -low, shape)
        codes = codes.astype(np.int8)
        scales = np.array([self.scale(0.02) for _ in range(channels if per_channel else 1)], np.float32)
        store(self, f"{name}/weight", codes, storage)
        weight_scale = scales if per_channel else scales[0]
        zero = np.zeros(channels, np.int8) if per_channel else np.int8(0)
        parameters = [self.constant(f"{name}/weight/scale", weight_scale, np.float32)]
        parameters.append(self.constant(f"{name}/weight/zero_point", zero, np.int8))
        inputs = [self.dequantize(x, name)]
        inputs.append(self.node("DequantizeLinear", [f"{name}/weight", *parameters], f"{name}/weight/real", axis=axis))
        fan_in = codes.size // channels
        spread_in_steps = np.sqrt(fan_in * np.square(codes, dtype=np.float64).mean() + 1) * x.qmax / 4
        if bias:
            values = self.rng.normal(0, spread_in_steps / 2, channels).astype(np.int32)
            self.constant(f"{name}/bias", values, np.int32)
            self.constant(f"{name}/bias/scale", x.scale * weight_scale, np.float32)
            source = [f"{name}/bias", f"{name}/bias/scale"]
            inputs.append(self.node("DequantizeLinear", source, f"{name}/bias/real", axis=0))
        self.weight_bits[name] = bits
        return inputs, float(spread_in_steps * x.scale * scales.mean())

    # ---- the file -----------------------------------------------------------------------------------------------

    def model(self, x: Tensor, logits: Tensor, *, float_input: bool = False) -> onnx.ModelProto:
        nodes = list(self.nodes)
        graph_input = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", *x.shape])
        if float_input:
            graph_input = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", *x.shape])
            self.constant("image/scale", np.float32(1) / np.float32(255), np.float32)
            self.constant("image/zero_point", 0, np.uint8)
            source = ["image", "image/scale", "image/zero_point"]
            nodes.insert(0, helper.make_node("QuantizeLinear", source, ["pixels"], name="pixels"))
        graph = helper.make_graph(
            nodes,
            "hand-made",
            [graph_input],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", *logits.shape])],
            list(self.initializers.values()),
        )
        opset, ir_version = (25, 13) if self.has_int2 else (21, 10)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
        channels, height, width = x.shape
        described = {
            "weight_bits": self.weight_bits,
            "trained_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "units": self.units,
            "input": {
                "dtype": "float32" if float_input else "uint8",
                "channels": channels,
                "height": height,
                "width": width,
            },
        }
        if self.islands:
            described |= {"float_values": self.float_values, "islands": self.islands}
        properties = {f"mecdeploy.{key}": json.dumps(value) for key, value in described.items()}
        helper.set_model_props(model, {"mecdeploy.format": "1", "mecdeploy.target": "onnxruntime", **properties})
        return model


def _pooled(
    shape: tuple[int, ...], *, kernel_shape: Any, strides: Any = (1, 1), pads: Any = (0, 0, 0, 0), ceil_mode: int = 0,
    dilations: Any = (1, 1), count_include_pad: int = 0,
) -> tuple[int, ...]:  # fmt: skip
    """Shape after a window, in torch's ceil_mode: the last window starts inside the input or its leading pad."""
    sizes = []
    for i, size in enumerate(shape[1:]):
        room = size + pads[i] + pads[i + 2] - dilations[i] * (kernel_shape[i] - 1) - 1
        count = (-(-room // strides[i]) if ceil_mode else room // strides[i]) + 1
        sizes.append(count - 1 if ceil_mode and (count - 1) * strides[i] >= size + pads[i] else count)
    return (shape[0], *sizes)


def residual_network(
    seed: int = 0, *, storage: str = "int4", dyadic: bool = False, act_bits: int = 4
) -> onnx.ModelProto:
    """A small network with every kind of unit: doubled Adds, depthwise and grouped convolutions, pools, two Gemms."""
    build = Builder(np.random.default_rng(seed), dyadic=dyadic)
    x = build.pixels((3, 13, 11))
    stem = build.conv("stem", x, 12, bits=8)
    narrow = build.conv("narrow", x, 12, bits=act_bits, storage=storage)
    first = build.conv("block.conv1", narrow, 12, bits=act_bits, storage=storage)
    second = build.conv("block.conv2", first, 12, bits=8, signed=True, storage=storage)
    skip = build.add("block.add/skip", second, stem)
    act = build.add("block.add/act", second, stem, bits=act_bits)
    wide = build.conv("depthwise", act, 12, strides=(2, 2), groups=12, bits=act_bits, storage=storage)
    mixed = build.conv("grouped", wide, 9, (2, 3), pads=(1, 1, 0, 1), groups=3, bits=8, signed=True, storage=storage)
    short = build.conv("short", skip, 9, (1, 1), strides=(2, 2), pads=(0, 0, 0, 0), bits=8, signed=True)
    joined = build.add("join", mixed, short, signed=True)
    pooled = build.move("MaxPool", "pool", joined, kernel_shape=(2, 2), strides=(1, 1), pads=(0, 0, 1, 1))
    mean = build.pool("GlobalAveragePool", "mean", pooled, signed=True)
    flat = build.move("Flatten", "flat", mean)
    hidden = build.gemm("hidden", flat, 10, bits=act_bits, storage=storage)
    logits = build.gemm("classifier", hidden, 7, to_logits=True)
    return build.model(x, logits)


def images(seed: int, count: int, shape: tuple[int, ...] = (3, 13, 11)) -> np.ndarray:
    """Pixels with structure: smooth fields plus noise, extremes included."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, shape[0], 3, 3)).repeat(shape[1], 2).repeat(shape[2], 3)
    smooth = coarse[:, :, 1 : 3 * shape[1] : 3, 1 : 3 * shape[2] : 3]
    return np.clip(smooth + rng.normal(0, 40, (count, *shape)), 0, 255).astype(np.uint8)


def to_logits(build: Builder, x: Tensor, y: Tensor, **ends: Any) -> onnx.ModelProto:
    """Finish a graph of a few units under test: average, flatten, classify."""
    flat = build.move("Flatten", "flat", build.pool("GlobalAveragePool", "mean", y))
    return build.model(x, build.gemm("classifier", flat, 5, to_logits=True), **ends)


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    (found,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    return found


def replace(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    """Overwrite one initialiser in place, in its own type."""
    tensor = initializer(model, name)
    tensor.CopyFrom(numpy_helper.from_array(value.astype(numpy_helper.to_array(tensor).dtype), name))


def value_of(model: onnx.ModelProto, name: str) -> np.ndarray:
    """A writable copy of one initialiser."""
    return numpy_helper.to_array(initializer(model, name)).copy()
