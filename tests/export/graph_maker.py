"""Builds IntegerGraphs with random integer weights, node by node: nothing of the training room takes part."""

from __future__ import annotations

import numpy as np

from mecdeploy.export.graph import (
    Add,
    Conv,
    Flatten,
    Gemm,
    GlobalAveragePool,
    IntegerGraph,
    MaxPool,
    Node,
    Quantization,
    Value,
    Weight,
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
        return self._append(node, source, act_bits, signed, spread)

    def gemm(
        self, name: str, source: str, features: int, *, weight_bits: int, act_bits: int | None, signed: bool = False
    ) -> str:
        weight, bias, spread = self._weight(source, (features, self.values[source].shape[0]), weight_bits)
        output = "logits" if act_bits is None else name
        node = Gemm(name=name, input=source, output=output, weight=weight, bias=bias)
        return self._append(node, source, act_bits, signed, spread)

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
        self.nodes.append(node)
        return self._value(name, output_shape(node, self.values[source].shape), self.values[source].quantization)

    def pool(self, name: str, source: str, act_bits: int) -> str:
        node = GlobalAveragePool(name=name, input=source, output=name)
        signed = self._codes(source).zero_point > 0
        return self._append(node, source, act_bits, signed, self._spread(source))

    def flatten(self, name: str, source: str) -> str:
        node = Flatten(name=name, input=source, output=name)
        self.nodes.append(node)
        return self._value(name, output_shape(node, self.values[source].shape), self.values[source].quantization)

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
        steps = deviation * self._spread(source) / self._codes(source).scale
        bias = self.rng.integers(-int(steps) // 2 - 1, int(steps) // 2 + 2, shape[0]).astype(np.int32)
        return Weight(codes=codes, bits=bits, scale=scale), bias, spread

    def _append(self, node: Node, source: str, act_bits: int | None, signed: bool, spread: float) -> str:
        assert not isinstance(node, Add)
        self.nodes.append(node)
        quantization = None if act_bits is None else self._fit(act_bits, signed, spread)
        return self._value(node.output, output_shape(node, self.values[source].shape), quantization)

    def _fit(self, bits: int, signed: bool, spread: float) -> Quantization:
        qmax = (1 << bits) - 1
        zero_point = 1 << (bits - 1) if signed else 0
        return self.quantization(qmax, zero_point, (4.0 if signed else 2.0) * spread / qmax)

    def _codes(self, name: str) -> Quantization:
        quantization = self.values[name].quantization
        assert quantization is not None
        return quantization

    def _spread(self, name: str) -> float:
        """A typical magnitude of the value's reals."""
        quantization = self._codes(name)
        return quantization.scale * quantization.qmax / 4

    def _value(self, name: str, shape: tuple[int, ...], quantization: Quantization | None) -> str:
        self.values[name] = Value(name=name, shape=shape, quantization=quantization)
        return name
