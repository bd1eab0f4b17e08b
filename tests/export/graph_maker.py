"""Builds IntegerGraphs with random integer weights, node by node: nothing of the training room takes part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from onnx import GraphProto

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
    Value,
    Weight,
    inputs_of,
    outputs_of,
)
from mecdeploy.export.shapes import output_shape

FIRST_LAST_BITS = 7
"""Range of the hand-made 8-bit weights: at 7 bits no CPU saturates the pair sums of 8-bit inputs."""


Pair = int | tuple[int, int]
Sides = int | tuple[int, int, int, int]


def _pair(size: Pair) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _sides(size: Sides) -> tuple[int, int, int, int]:
    return (size,) * 4 if isinstance(size, int) else size


class Maker:
    """Appends nodes one by one; scales are irregular, as learned ones are, and leave codes spread over their range."""

    def __init__(self, name: str, shape: tuple[int, ...], seed: int, *, zero_point: int = 118) -> None:
        self.rng = np.random.default_rng(seed)
        self.name = name
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self._value("pixels", shape, self.quantization(255, zero_point, 1 / 63.7))

    def quantization(self, qmax: int, zero_point: int, scale: float) -> Quantization:
        scale *= self.rng.uniform(0.8, 1.25)
        return Quantization(scale=float(np.float32(scale)), zero_point=zero_point, qmax=qmax)

    def conv(
        self, name: str, source: str, channels: int, kernel: Pair, *, weight_bits: int, act_bits: int,
        signed: bool = False, stride: Pair = 1, padding: Sides = 0, dilation: Pair = 1, groups: int = 1,
    ) -> str:  # fmt: skip
        shape = (channels, self.values[source].shape[0] // groups, *_pair(kernel))
        weight, bias, spread = self._weight(source, shape, weight_bits)
        node = Conv(
            name=name, input=source, output=name, weight=weight, bias=bias, stride=_pair(stride),
            padding=_sides(padding), dilation=_pair(dilation), groups=groups,
        )  # fmt: skip
        return self._append(node, act_bits, signed, spread)

    def gemm(
        self, name: str, source: str, features: int, *,
        weight_bits: int, act_bits: int | None, signed: bool = False, output: str | None = None,
    ) -> str:  # fmt: skip
        """act_bits None: a float output, the logits unless it has a name."""
        weight, bias, spread = self._weight(source, (features, self.values[source].shape[-1]), weight_bits)
        output = output or ("logits" if act_bits is None else name)
        node = Gemm(name=name, input=source, output=output, weight=weight, bias=bias)
        return self._append(node, act_bits, signed, spread)

    def add(self, name: str, left: str, right: str, **bits: tuple[int, bool]) -> list[str]:
        """bits: suffix -> (width, signed) of one output."""
        outputs = tuple(f"{name}/{suffix}" for suffix in bits)
        self.nodes.append(Add(name=name, inputs=(left, right), outputs=outputs))
        spread = np.hypot(self._spread(left), self._spread(right))
        for output, (width, signed) in zip(outputs, bits.values(), strict=True):
            self._value(output, self.values[left].shape, self._fit(width, signed, spread))
        return list(outputs)

    def max_pool(
        self, name: str, source: str, kernel: Pair, stride: Pair, *,
        padding: Sides = 0, dilation: Pair = 1, ceil: bool = False,
    ) -> str:  # fmt: skip
        node = MaxPool(
            name=name, input=source, output=name, kernel=_pair(kernel), stride=_pair(stride),
            padding=_sides(padding), dilation=_pair(dilation), ceil_mode=ceil,
        )  # fmt: skip
        return self._move(node)

    def pool(self, name: str, source: str, act_bits: int) -> str:
        node = GlobalAveragePool(name=name, input=source, output=name)
        return self._append(node, act_bits, self._is_signed(source), self._spread(source))

    def average_pool(
        self, name: str, source: str, kernel: Pair, stride: Pair, act_bits: int, *,
        padding: Sides = 0, count_include_pad: bool = True,
    ) -> str:  # fmt: skip
        node = AveragePool(
            name=name, input=source, output=name, kernel=_pair(kernel), stride=_pair(stride),
            padding=_sides(padding), count_include_pad=count_include_pad,
        )  # fmt: skip
        return self._append(node, act_bits, self._is_signed(source), self._spread(source))

    def mul(self, name: str, left: str, right: str, act_bits: int) -> str:
        node = Elementwise(name=name, kind="mul", inputs=(left, right), output=name)
        signed = self._is_signed(left) or self._is_signed(right)
        return self._append(node, act_bits, signed, self._spread(left) * self._spread(right))

    def gate(self, name: str, kind: str, source: str, act_bits: int, reach: float | None = None) -> str:
        """A sigmoid or a hard sigmoid: codes from 0, the last of which means `reach`: by default some below 1."""
        qmax = (1 << act_bits) - 1
        scale = float(np.float32((reach or self.rng.uniform(0.8, 1.0)) / qmax))
        node = Elementwise(name=name, kind=kind, inputs=(source,), output=name)
        self.nodes.append(node)
        return self._value(name, self._made(node), Quantization(scale=scale, zero_point=0, qmax=qmax))

    def leaky_relu(self, name: str, source: str, alpha: float, act_bits: int) -> str:
        node = Elementwise(name=name, kind="leaky_relu", inputs=(source,), output=name, alpha=alpha)
        return self._append(node, act_bits, alpha != 0, self._spread(source))

    def flatten(self, name: str, source: str) -> str:
        return self._move(Flatten(name=name, input=source, output=name))

    def reshape(self, name: str, source: str, shape: tuple[int, ...]) -> str:
        return self._move(Reshape(name=name, input=source, output=name), shape)

    def transpose(self, name: str, source: str, *permutation: int) -> str:
        return self._move(Transpose(name=name, input=source, output=name, permutation=permutation))

    def slice(self, name: str, source: str, axis: int, start: int, stop: int, step: int = 1) -> str:
        return self._move(Slice(name=name, input=source, output=name, axis=axis, start=start, stop=stop, step=step))

    def concat(self, name: str, *sources: str, axis: int = 1) -> str:
        """Join values that share scale and zero point; the output holds the codes of all."""
        node = Concat(name=name, inputs=sources, output=name, axis=axis)
        self.nodes.append(node)
        codes = [self.codes(source) for source in sources]
        joined = replace(codes[0], qmin=min(one.qmin for one in codes), qmax=max(one.qmax for one in codes))
        return self._value(name, self._made(node), joined)

    def share(self, name: str, source: str, *, qmin: int | None = None) -> str:
        """Give value `name` the quantization of `source`, as values of one Concat have it; qmin where a ReLU holds."""
        shared = self.codes(source)
        return self._value(name, self.values[name].shape, replace(shared, qmin=shared.qmin if qmin is None else qmin))

    def learned(self, name: str) -> str:
        """Give signed value `name` a zero point as training might find it; before anything reads the value."""
        old = self.codes(name)
        zero_point = int(self.rng.integers(old.qmax // 4, 3 * old.qmax // 4 + 1))
        return self._value(name, self.values[name].shape, replace(old, zero_point=zero_point))

    def island(
        self, name: str, sources: Sequence[str], graph: GraphProto, batch_axis: int = 0, **shapes: tuple[int, ...]
    ) -> list[str]:
        """shapes: output -> its shape. The values are named `<island>.<output>`."""
        outputs = tuple(f"{name}.{output}" for output in shapes)
        node = FloatIsland(
            name=name,
            inputs=tuple(sources),
            outputs=outputs,
            graph=graph,
            operators=("made by hand",),
            reason="a test",
        )
        self.nodes.append(node)
        for output, shape in zip(outputs, shapes.values(), strict=True):
            self.values[output] = Value(name=output, shape=shape, quantization=None, batch_axis=batch_axis)
        return list(outputs)

    def quantize(self, name: str, source: str, act_bits: int, spread: float = 1.0) -> str:
        return self._append(Quantize(name=name, input=source, output=name), act_bits, True, spread)

    def dequantize(self, source: str) -> str:
        return self._append(Dequantize(name="dequantize", input=source, output="logits"), None, True, 1.0)

    def graph(self) -> IntegerGraph:
        return IntegerGraph(
            name=self.name, input="pixels", output="logits", values=self.values, nodes=tuple(self.nodes)
        )

    def _weight(self, source: str, shape: tuple[int, ...], bits: int) -> tuple[Weight, np.ndarray, float]:
        half = 1 << ((FIRST_LAST_BITS if bits == 8 else bits) - 1)
        codes = self.rng.integers(-half, half, shape).astype(np.int8)
        deviation = float(np.sqrt(np.prod(shape[1:]) * np.mean(codes.astype(np.float64) ** 2)))
        # reals stay around 1, so that both sides of a residual sum matter
        scale = (self.rng.uniform(0.5, 2.0, shape[0]) / (deviation * self._spread(source))).astype(np.float32)
        spread = deviation * float(scale.mean()) * self._spread(source)
        steps = deviation * self._spread(source) / self.codes(source).scale
        bias = self.rng.integers(-int(steps) // 2 - 1, int(steps) // 2 + 2, shape[0]).astype(np.int32)
        return Weight(codes=codes, bits=bits, scale=scale), bias, spread

    def _append(self, node: Node, act_bits: int | None, signed: bool, spread: float) -> str:
        (output,) = outputs_of(node)
        self.nodes.append(node)
        quantization = None if act_bits is None else self._fit(act_bits, signed, spread)
        self._value(output, self._made(node), quantization)
        if isinstance(node, Gemm | Quantize):
            self.values[output] = replace(self.values[output], batch_axis=self.values[node.input].batch_axis)
        return output

    def _move(self, node: MaxPool | Flatten | Reshape | Transpose | Slice, shape: tuple[int, ...] | None = None) -> str:
        self.nodes.append(node)
        return self._value(node.output, shape or self._made(node), self.values[node.input].quantization)

    def _made(self, node: Node) -> tuple[int, ...]:
        shape = output_shape(node, [self.values[name].shape for name in inputs_of(node)])
        assert shape is not None
        return shape

    def _fit(self, bits: int, signed: bool, spread: float) -> Quantization:
        qmax = (1 << bits) - 1
        zero_point = 1 << (bits - 1) if signed else 0
        return self.quantization(qmax, zero_point, (4.0 if signed else 2.0) * spread / qmax)

    def codes(self, name: str) -> Quantization:
        quantization = self.values[name].quantization
        assert quantization is not None
        return quantization

    def _is_signed(self, name: str) -> bool:
        return self.codes(name).zero_point > 0

    def _spread(self, name: str) -> float:
        """A typical magnitude of the value's reals."""
        quantization = self.codes(name)
        return quantization.scale * quantization.qmax / 4

    def _value(self, name: str, shape: tuple[int, ...], quantization: Quantization | None) -> str:
        self.values[name] = Value(name=name, shape=shape, quantization=quantization)
        return name
