"""What an inspection found, as frozen data that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or output of the graph. shape: sizes, names of sizes left open, None where nothing is said of one.

    shape is None where not even the number of dimensions is known.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, kw_only=True)
class TensorBytes:
    """A constant of the file. bytes: of its values as they lie there; external: the file beside it that holds them.

    read_by: op types and names of the nodes that read it, at most three.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    external: str | None
    read_by: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """The file without onnxruntime. bytes: of the file, external_bytes: of the files beside it.

    tensor_bytes: of the values of all constants in the file itself, metadata_bytes: of its metadata; graph_bytes is the
    rest (nodes, names, shapes), so that the three add up to `bytes`. parameters: numbers in the constants that layers
    with weights multiply with, and in their biases.
    """

    path: str
    bytes: int
    external_bytes: int
    tensor_bytes: int
    metadata_bytes: int
    graph_bytes: int
    ir_version: int
    opsets: Mapping[str, int]
    producer: str
    nodes: int
    operators: Mapping[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parameters: int
    tensors: tuple[TensorBytes, ...]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How an activation is stored: real = (code - zero_point) * scale.

    bits: of the codes, by their type or by the Clip they go through. scales: how many there are, 1 for a whole
    tensor. scale, zero_point: smallest and largest; None where they are computed at run time.
    """

    dtype: str
    bits: int
    scales: int
    scale: tuple[float, float] | None
    zero_point: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of a layer. tensor: the constant that holds them; dtype: what reaches the layer's DequantizeLinear.

    storage: what lies in the file (float32, int8, int4, int2, table, ...); stored_bits of it for one weight.
    used_bits: the fewest that hold every value less its zero point, levels: how many different values there are;
    smallest, largest: the values themselves, zero points not subtracted. All None where the weights are float.
    per: tensor, channel or block; scale and zero_point: smallest and largest, None without any.
    clip: whether the file clips them on their way. bytes: of the weights; table_bytes: of a table of their own.
    """

    tensor: str
    shape: tuple[int, ...]
    dtype: str
    storage: str
    stored_bits: int
    used_bits: int | None
    levels: int | None
    smallest: int | None
    largest: int | None
    per: str | None
    scale: tuple[float, float] | None
    zero_point: tuple[int, int] | None
    clip: bool
    bytes: int
    table_bytes: int


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why an operator is computed in float. kind: a row of docs/inspect.md; what: the same in words, with names."""

    kind: str
    what: str


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """A layer with weights.

    kernel: what onnxruntime runs in its place, None where it fused it away, or refuses the file. arithmetic: "integer",
    "mixed" (integers multiplied, scaled in float around it), "float", or None with the kernel. input, output: None
    where they are float. bias: its type in the file, None without one, and bias_size numbers. reasons: why it is not
    integer.
    """

    name: str
    op: str
    kernel: str | None
    arithmetic: str | None
    weights: Weights
    input: Quantization | None
    output: Quantization | None
    bias: str | None
    bias_size: int
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, kw_only=True)
class FloatIsland:
    """Operators that onnxruntime computes in float and that feed each other.

    kernels: op type -> count in the optimised graph. nodes: those of the file that they come from.
    """

    kernels: Mapping[str, int]
    nodes: tuple[str, ...]
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, kw_only=True)
class RuntimeFacts:
    """What onnxruntime makes of the file. error: why it refuses it, None if it does not; then all else is empty."""

    version: str
    error: str | None
    kernels: Mapping[str, int]
    integer_products: tuple[str, ...]
    mixed_products: tuple[str, ...]
    float_products: tuple[str, ...]
    islands: tuple[FloatIsland, ...]


@dataclass(frozen=True, kw_only=True)
class Promises:
    """What mecdeploy's own metadata says, as it is written there; None what it leaves out. islands: why, by name."""

    target: str | None
    classes: int | None
    input: Mapping[str, Any] | None
    weight_bits: Mapping[str, int] | None
    activation_bits: Mapping[str, int] | None
    checkpoint_sha256: str | None
    islands: Mapping[str, str] | None


@dataclass(frozen=True, kw_only=True)
class InspectionReport:
    """Everything. metadata: None for a file of another tool. warnings: what is wrong with the file, if something is."""

    file: FileFacts
    runtime: RuntimeFacts
    layers: tuple[LayerFacts, ...]
    metadata: Promises | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as JSON's types, under the names of its fields."""
        return asdict(self)
