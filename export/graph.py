"""The IntegerGraph: a trained network as integer kernels, before anything is said about ONNX.

Every node is one kernel at run time. Every Value but the logits is a tensor of uint8 codes with one Quantization, and
real = (code - zero_point) * scale. A ReLU is no node: a zero_point of 0 saturates at it. Nothing here can be changed
in place; a pass builds a new graph with `dataclasses.replace`. The rules a graph obeys are in validation.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How uint8 codes stand for reals: real = (code - zero_point) * scale, code in 0..qmax.

    scale: real units per integer step, a float32 value, > 0.
    zero_point: the code of real 0, in 0..qmax; 0 after a ReLU, 2^(bits-1) for signed values.
    qmax: 2^bits - 1. Codes are stored as uint8 at every width; below 255 an integer Clip holds them.
    """

    scale: float
    zero_point: int
    qmax: int

    @property
    def bits(self) -> int:
        """Width of the codes, in bits."""
        return self.qmax.bit_length()


@dataclass(frozen=True, kw_only=True)
class Value:
    """A tensor between nodes. shape: without the batch dimension. quantization: None for float32 (the logits)."""

    name: str
    shape: tuple[int, ...]
    quantization: Quantization | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Weight:
    """Symmetric weights: real = codes * scale[output channel].

    codes: int8 [O, I / groups, kh, kw] (Conv) or [O, I] (Gemm), in -2^(bits-1)..2^(bits-1)-1.
    bits: the width they were trained at: 2, 3, 4 or 8.
    scale: float32 [O], finite, > 0; BatchNorm's gamma and sigma are already in it.
    packed_bits: the width they take in the file, >= bits; 0 until a pass chooses.
    storage: int8, int4, int2 or table; empty until a pass chooses.
    """

    codes: NDArray[np.int8]
    bits: int
    scale: NDArray[np.float32]
    packed_bits: int = 0
    storage: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Conv:
    """Convolution, BatchNorm and activation as one integer kernel.

    bias: int32 [O], in steps of input scale * weight scale. stride, dilation: (height, width).
    padding: (top, left, bottom, right), filled with the input's zero point, which is real 0.
    """

    name: str
    input: str
    output: str
    weight: Weight
    bias: NDArray[np.int32]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Gemm:
    """Fully connected layer, y = x W^T + b. Its output may be float32: then it is the logits. bias: int32 [O]."""

    name: str
    input: str
    output: str
    weight: Weight
    bias: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Add:
    """Residual sum of two quantised tensors; several outputs are one float sum quantised several ways."""

    name: str
    inputs: tuple[str, str]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MaxPool:
    """Maximum over windows, on the codes: the output has the input's Quantization.

    kernel, stride, dilation: (height, width). padding: (top, left, bottom, right); padded places never win.
    """

    name: str
    input: str
    output: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False


@dataclass(frozen=True, kw_only=True)
class GlobalAveragePool:
    """Mean over height and width, [C, H, W] -> [C, 1, 1], requantised to the output's own Quantization."""

    name: str
    input: str
    output: str


@dataclass(frozen=True, kw_only=True)
class Flatten:
    """[C, H, W] -> [C * H * W], on the codes: the output has the input's Quantization."""

    name: str
    input: str
    output: str


Node: TypeAlias = Conv | Gemm | Add | MaxPool | GlobalAveragePool | Flatten


@dataclass(frozen=True, kw_only=True, eq=False)
class IntegerGraph:
    """A whole network. nodes: in topological order. values: name -> Value, the input and the output included."""

    name: str
    input: str
    output: str
    values: Mapping[str, Value]
    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", MappingProxyType(dict(self.values)))


def inputs_of(node: Node) -> tuple[str, ...]:
    """Names of the values a node reads, in order."""
    return node.inputs if isinstance(node, Add) else (node.input,)


def outputs_of(node: Node) -> tuple[str, ...]:
    """Names of the values a node writes, in order."""
    return node.outputs if isinstance(node, Add) else (node.output,)
