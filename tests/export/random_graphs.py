"""Random IntegerGraphs: whatever may stand behind whatever, at any width, zero point and shape."""

from __future__ import annotations

from collections.abc import Callable

from graph_maker import Maker

from mecdeploy.export.graph import IntegerGraph

WIDTHS = (2, 3, 4, 6, 8)


class RandomNetwork:
    """Keeps the images that later nodes may read, and appends a node of a random kind at a time."""

    def __init__(self, seed: int) -> None:
        self.make = Maker(f"random-{seed}", (3, 11, 9), seed)
        self.rng = self.make.rng
        self.images = [self._signed(self.make.conv("stem", "pixels", 6, 3, weight_bits=8, act_bits=8, signed=True))]
        self.kinds: tuple[Callable[[str, str], str], ...] = (
            self._conv, self._depthwise, self._add, self._mul, self._gated, self._excited, self._leaky, self._average,
            self._max, self._concat, self._shuffle, self._slice, self._turn, self._tokens,
        )  # fmt: skip

    def graph(self, count: int) -> IntegerGraph:
        for position in range(count):
            kind = self.kinds[self.rng.integers(len(self.kinds))]
            self.images.append(kind(f"n{position}", self._image()))
        pooled = self.make.pool("pool", self.images[-1], self._width())
        self.make.gemm("classifier", self.make.flatten("flat", pooled), 5, weight_bits=8, act_bits=None)
        return self.make.graph()

    def _image(self) -> str:
        recent = self.images[-3:]
        return recent[self.rng.integers(len(recent))]

    def _width(self) -> int:
        return int(self.rng.choice(WIDTHS))

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.make.values[name].shape

    def _signed(self, name: str) -> str:
        return self.make.learned(name)

    def _conv(self, name: str, source: str) -> str:
        channels, signed = int(self.rng.integers(1, 20)), bool(self.rng.integers(2))
        kernel = min(int(self.rng.choice([1, 3])), *self._shape(source)[1:])
        stride = int(self.rng.integers(1, 3)) if min(self._shape(source)[1:]) > 4 else 1
        made = self.make.conv(
            name, source, channels, kernel, weight_bits=4, act_bits=self._width(), signed=signed, stride=stride,
            padding=kernel // 2,
        )  # fmt: skip
        return self._signed(made) if signed else made

    def _depthwise(self, name: str, source: str) -> str:
        channels = self._shape(source)[0]
        return self.make.conv(
            name, source, channels, 3, weight_bits=8, act_bits=self._width(), groups=channels, padding=1
        )

    def _add(self, name: str, source: str) -> str:
        other = self._conv_like(f"{name}.other", source)
        left, right = (source, other) if self.rng.integers(2) else (other, source)
        first, second = self.make.add(name, left, right, a=(self._width(), True), b=(self._width(), False))
        self.images.append(second)
        return self._signed(first)

    def _mul(self, name: str, source: str) -> str:
        return self.make.mul(name, source, self._conv_like(f"{name}.other", source), self._width())

    def _gated(self, name: str, source: str) -> str:
        kind = str(self.rng.choice(["sigmoid", "hard_sigmoid"]))
        return self._signed_if(self.make.mul(name, source, self.make.gate(f"{name}.gate", kind, source, 8), 8))

    def _excited(self, name: str, source: str) -> str:
        mean = self.make.pool(f"{name}.mean", source, 8)
        outer = self.make.conv(
            f"{name}.fc", mean, self._shape(source)[0], 1, weight_bits=8, act_bits=self._width(), signed=True
        )
        gate = self.make.gate(f"{name}.gate", "hard_sigmoid", self._signed(outer), self._width())
        return self._signed_if(self.make.mul(name, gate, source, self._width()))

    def _leaky(self, name: str, source: str) -> str:
        return self._signed_if(self.make.leaky_relu(name, source, float(self.rng.choice([0.0, 0.1, 0.25])), 8))

    def _average(self, name: str, source: str) -> str:
        kernel = min(int(self.rng.integers(1, 4)), *self._shape(source)[1:])
        padding = int(self.rng.integers(0, kernel))
        counts = bool(self.rng.integers(2))
        return self.make.average_pool(name, source, kernel, 1, 8, padding=padding, count_include_pad=counts)

    def _max(self, name: str, source: str) -> str:
        return self.make.max_pool(name, source, 3, 1, padding=1)

    def _concat(self, name: str, source: str) -> str:
        other = self._conv_like(f"{name}.other", source)
        self.make.share(other, source, qmin=self.make.codes(source).zero_point)
        return self.make.concat(name, *((source, other) if self.rng.integers(2) else (other, source, other)))

    def _shuffle(self, name: str, source: str) -> str:
        channels, *size = self._shape(source)
        groups = next(count for count in (3, 2, 1) if channels % count == 0)
        split = self.make.reshape(f"{name}.split", source, (groups, channels // groups, *size))
        return self.make.reshape(name, self.make.transpose(f"{name}.swap", split, 0, 2, 1, 3, 4), (channels, *size))

    def _slice(self, name: str, source: str) -> str:
        channels = self._shape(source)[0]
        return self.make.slice(name, source, 1, channels // 3, channels, int(self.rng.integers(1, 3)))

    def _turn(self, name: str, source: str) -> str:
        return self.make.transpose(name, source, 0, 1, 3, 2)

    def _tokens(self, name: str, source: str) -> str:
        """An image as tokens, through a Gemm, and back."""
        channels, height, width = self._shape(source)
        tokens = self.make.transpose(
            f"{name}.t", self.make.reshape(f"{name}.r", source, (channels, height * width)), 0, 2, 1
        )
        mixed = self.make.gemm(f"{name}.fc", tokens, 7, weight_bits=4, act_bits=self._width(), signed=True)
        return self.make.reshape(
            name, self.make.transpose(f"{name}.b", self._signed(mixed), 0, 2, 1), (7, height, width)
        )

    def _conv_like(self, name: str, source: str) -> str:
        made = self.make.conv(
            name, source, self._shape(source)[0], 1, weight_bits=4, act_bits=self._width(), signed=True
        )
        return self._signed(made)

    def _signed_if(self, name: str) -> str:
        return self._signed(name) if self.make.codes(name).zero_point else name


def random_graph(seed: int, count: int = 12) -> IntegerGraph:
    """A network of `count` random nodes and what each of them brings along."""
    return RandomNetwork(seed).graph(count)
