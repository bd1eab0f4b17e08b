"""The IntegerGraph: a trained network as integer kernels, before anything is said about ONNX.

Every node is one kernel at run time, a FloatIsland excepted. A Value is a tensor of uint8 codes with one Quantization,
real = (code - zero_point) * scale, or float32: what a FloatIsland or a Gemm before one makes, and the logits. A ReLU is
no node: codes held at zero_point saturate at it. Nothing here can be changed in place; a pass builds a new graph with
`dataclasses.replace`. The rules a graph obeys are in validation.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How uint8 codes stand for reals: real = (code - zero_point) * scale, code in qmin..qmax.

    scale: real units per integer step, a float32 value, > 0.
    zero_point: the code of real 0, in 0..qmax; 0 after a ReLU, 2^(bits-1) for signed values, or a learned one.
    qmax: 2^bits - 1. Codes are stored as uint8 at every width; below 255 an integer Clip holds them.
    qmin: 0, or zero_point where a ReLU's output shares the scale of signed values; an integer Clip holds it.
    """

    scale: float
    zero_point: int
    qmax: int
    qmin: int = 0

    @property
    def bits(self) -> int:
        """Width of the codes, in bits."""
        return self.qmax.bit_length()


@dataclass(frozen=True, kw_only=True)
class Value:
    """A tensor between nodes.

    shape: without the batch's dimension. batch_axis: where that stands; anywhere but first only between float islands
    and Gemms, for networks that keep tokens before images. quantization: None for float32.
    """

    name: str
    shape: tuple[int, ...]
    quantization: Quantization | None
    batch_axis: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Weight:
    """Symmetric weights: real = codes * scale[output channel].

    codes: int8 [O, I / groups, kh, kw] (Conv) or [O, I] (Gemm), in -2^(bits-1)..2^(bits-1)-1, or of the levels.
    bits: the width they were trained at: 1 (with levels), 2, 3, 4 or 8.
    scale: float32 [O], finite, > 0; BatchNorm's gamma and sigma are already in it.
    levels: int8 [n], ascending, n <= 2^bits: what codes can be; or [n, 4], n <= 256: what each four successive codes of
    a filter can be. None for the plain range.
    packed_bits: the width they take in the file, >= bits; 0 until a pass chooses.
    storage: int8, int4, int2 or table; empty until a pass chooses.
    """

    codes: NDArray[np.int8]
    bits: int
    scale: NDArray[np.float32]
    levels: NDArray[np.int8] | None = None
    packed_bits: int = 0
    storage: str = ""

    @property
    def packed_levels(self) -> NDArray[np.int8] | None:
        """The levels that the file holds codes of; None where it holds the codes themselves, as at a wider width."""
        return self.levels if self.packed_bits == self.bits else None


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
    """Fully connected layer over the last axis, y = x W^T + b: (..., I) -> (..., O). bias: int32 [O].

    Its output may be float32: the logits, or what a FloatIsland reads.
    """

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


@dataclass(frozen=True, kw_only=True)
class Elementwise:
    """One real function of each position, requantised: (inputs) -> output, shapes broadcast to the output's.

    kind: mul (two inputs), sigmoid, hard_sigmoid (clip(x / 6 + 1 / 2, 0, 1)), leaky_relu (max(x, alpha * x)).
    emission/elementwise.py has one function for each.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    output: str
    alpha: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AveragePool:
    """Mean over windows, requantised to the output's own Quantization.

    kernel, stride: (height, width). padding: (top, left, bottom, right), filled with real 0.
    count_include_pad: whether padded places count in the divisor.
    """

    name: str
    input: str
    output: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    count_include_pad: bool = True


@dataclass(frozen=True, kw_only=True)
class Concat:
    """Codes of several values side by side along `axis` (the batch is axis 0): all have one scale and zero point."""

    name: str
    inputs: tuple[str, ...]
    output: str
    axis: int


@dataclass(frozen=True, kw_only=True)
class Reshape:
    """The codes in the output's shape: the output has the input's Quantization."""

    name: str
    input: str
    output: str


@dataclass(frozen=True, kw_only=True)
class Transpose:
    """The codes with axes in another order, the batch staying first: permutation[0] is 0."""

    name: str
    input: str
    output: str
    permutation: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Every `step`-th code from start up to stop along `axis` (the batch is axis 0, and is never cut)."""

    name: str
    input: str
    output: str
    axis: int
    start: int
    stop: int
    step: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class FloatIsland:
    """Operators without an integer kernel, as a piece of ONNX in float32.

    graph: its inputs stand for `inputs` and its outputs for `outputs`, in order. An input declared FLOAT receives the
    value's reals, one declared UINT8 the codes themselves (the pixels, for the batch size). Outputs are float values.
    operators: what it computes, by the names PyTorch has for them; reason: why in float.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    graph: GraphProto
    operators: tuple[str, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """A float value as codes: clamp(rint(x / scale) + zero_point)."""

    name: str
    input: str
    output: str


@dataclass(frozen=True, kw_only=True)
class Dequantize:
    """Codes as a float value: only for the logits of a network that does not end in a Gemm."""

    name: str
    input: str
    output: str


Node: TypeAlias = (
    Conv
    | Gemm
    | Add
    | Elementwise
    | MaxPool
    | AveragePool
    | GlobalAveragePool
    | Flatten
    | Reshape
    | Transpose
    | Slice
    | Concat
    | FloatIsland
    | Quantize
    | Dequantize
)


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
    return node.inputs if isinstance(node, Add | Elementwise | Concat | FloatIsland) else (node.input,)


def outputs_of(node: Node) -> tuple[str, ...]:
    """Names of the values a node writes, in order."""
    return node.outputs if isinstance(node, Add | FloatIsland) else (node.output,)
