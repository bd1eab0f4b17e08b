"""The graph as integer kernels see it: DequantizeLinear -> op -> QuantizeLinear, read into plain operands."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mecdeploy.runtime_checks.arithmetic import Real
from mecdeploy.runtime_checks.errors import CheckError
from mecdeploy.runtime_checks.weights import Constant, Constants

MOVING = ("Clip", "MaxPool", "Flatten", "Reshape", "Transpose", "Slice", "Concat")
"""Operators that leave stored codes stored codes, at the scale they had."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A tensor of stored uint8 codes with real = (code - zero_point) * scale."""

    tensor: str
    scale: np.float32
    zero_point: int


@dataclass(frozen=True, kw_only=True)
class Product:
    """A convolution or matrix product between quantised operands.

    unit: the name its weights carry. weight: int8, output channels first, stored as `stored` says. weight_scale: [O] or
    [1]. bias: int32 [O] with bias_scale [O] or [1], or None. output: None when the result stays float: the logits, or
    what a float island reads.
    """

    node: onnx.NodeProto
    unit: str
    input: Quantized
    weight: NDArray[np.int8]
    weight_scale: Real
    stored: Constant
    bias: NDArray[np.int32] | None
    bias_scale: Real | None
    output: Quantized | None


class Graph:
    """Lookups over one graph, and the patterns onnxruntime fuses; anything else is a CheckError by node name.

    islands: names of the float islands; a node called `<island>/...` is one of its nodes.
    """

    def __init__(self, proto: onnx.GraphProto, islands: Collection[str] = ()) -> None:
        self.proto = proto
        self._islands = frozenset(islands)
        self.constants = Constants(proto)
        self.outputs = {value.name for value in proto.output}
        self.producers = {name: node for node in proto.node for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in proto.node:
            for name in node.input:
                self.consumers[name].append(node)

    def tensors(self) -> set[str]:
        """Every tensor a node writes, and the graph's inputs."""
        return set(self.producers) | {value.name for value in self.proto.input}

    def island(self, node: onnx.NodeProto) -> str | None:
        """Name of the float island a node belongs to."""
        return island_of(node.name, self._islands)

    def written_by_island(self, tensor: str) -> bool:
        """Whether a node of a float island writes the tensor."""
        producer = self.producers.get(tensor)
        return producer is not None and self.island(producer) is not None

    def is_stored(self, tensor: str) -> bool:
        """Whether a tensor holds stored codes: quantised, or codes moved, or the pixels; else it is float."""
        node = self.producers.get(tensor)
        while node is not None and self.island(node) is None and node.op_type in MOVING:
            tensor = node.input[0]
            node = self.producers.get(tensor)
        if node is not None:
            return bool(node.op_type == "QuantizeLinear")
        kinds = {value.name: value.type.tensor_type.elem_type for value in self.proto.input}
        return kinds.get(tensor) == onnx.TensorProto.UINT8

    def stays_float(self, node: onnx.NodeProto) -> bool:
        """Whether a Gemm's output is the logits or goes, maybe through a Reshape, to float islands alone."""
        if node.op_type != "Gemm":
            return False
        (name,) = node.output
        readers = self.consumers[name]
        if not readers:
            return name in self.outputs
        return all(self.island(reader) is not None or reader.op_type == "Reshape" for reader in readers)

    def constant(self, node: onnx.NodeProto, index: int) -> NDArray[Any]:
        """Input `index` of a node, which must be known from the file."""
        found = self.constants.get(node.input[index]) if index < len(node.input) else None
        if found is None:
            raise fault(node, f"input {index} is not a constant of the file")
        return found.value

    def code_range(self, tensor: str, full: tuple[int, int] = (0, 255)) -> tuple[int, int]:
        """Smallest and largest code a stored tensor can hold: the Clip's, seen through ops that only move codes.

        full: what its type can hold.
        """
        node = self.producers.get(tensor)
        if node is None or node.op_type not in MOVING:
            return full
        if node.op_type == "Clip":
            given = [index < len(node.input) and node.input[index] != "" for index in (1, 2)]
            low, high = (int(self.constant(node, i).item()) if given[i - 1] else full[i - 1] for i in (1, 2))
            return low, high
        sources = node.input if node.op_type == "Concat" else node.input[:1]
        ranges = [self.code_range(source, full) for source in sources]
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    def own_tables(self, weight: Constant) -> int:
        """Bytes of the tables that this weight's codes go through, whose initialiser is named for one weight alone.

        A table for all weights of a grid may have one reader, too; then its name does not begin like the codes'.
        """
        unit = weight.source.rpartition("/")[0]
        own = [self.constants.get(name) for name in weight.tables if unit and name.startswith(f"{unit}/")]
        return sum(table.stored_bytes for table in own if table is not None)

    def dequantized(self, node: onnx.NodeProto, index: int) -> Quantized:
        """Input `index` of a node, which must be stored codes through a DequantizeLinear."""
        source = self.producers.get(node.input[index])
        if source is None or source.op_type != "DequantizeLinear":
            raise fault(node, f"input {index} ({node.input[index]!r}) is not dequantised from integers")
        return self.quantization(source, source.input[0])

    def quantized(self, node: onnx.NodeProto) -> Quantized:
        """The one QuantizeLinear that reads a node's float output."""
        (name,) = node.output
        readers = self.consumers[name]
        if len(readers) != 1 or readers[0].op_type != "QuantizeLinear" or name in self.outputs:
            listed = ", ".join(reader.op_type for reader in readers) or "nothing"
            raise fault(node, f"its float output is read by {listed} instead of one QuantizeLinear")
        return self.quantization(readers[0], readers[0].output[0])

    def quantization(self, node: onnx.NodeProto, tensor: str) -> Quantized:
        """Scale and zero point of a QuantizeLinear or DequantizeLinear of activations: one each, uint8."""
        scale, zero_point = self.constant(node, 1), self.constant(node, 2)
        if zero_point.dtype != np.uint8 or zero_point.size != 1:
            raise fault(node, f"zero point is {zero_point.dtype} {zero_point.tolist()}; activations need one uint8")
        if scale.dtype != np.float32 or scale.size != 1 or not 0 < scale.item() < np.inf:
            raise fault(node, f"scale is {scale.dtype} {scale.tolist()}; activations need one positive float32")
        return Quantized(tensor=tensor, scale=np.float32(scale.item()), zero_point=int(zero_point.item()))

    def product(self, node: onnx.NodeProto) -> Product:
        """A Conv or Gemm with its weights, whose output axis is brought first."""
        axis = 0
        if node.op_type == "Gemm":
            attributes = attributes_of(node)
            plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
            if any(attributes.get(key, value) != value for key, value in plain.items()):
                raise fault(node, "alpha, beta or transA is not the default")
            axis = 0 if attributes.get("transB", 0) else 1
        weight, scale, stored = self._weight(node, axis)
        bias, bias_scale = self._bias(node, weight.shape[axis])
        return Product(
            node=node,
            unit=unit_of(stored, node),
            input=self.dequantized(node, 0),
            weight=np.moveaxis(weight, axis, 0),
            weight_scale=scale,
            stored=stored,
            bias=bias,
            bias_scale=bias_scale,
            output=None if self.stays_float(node) else self.quantized(node),
        )

    def products(self) -> list[Product]:
        """Every Conv and Gemm outside float islands, in the graph's order."""
        nodes = (node for node in self.proto.node if node.op_type in ("Conv", "Gemm") and self.island(node) is None)
        return [self.product(node) for node in nodes]

    def _weight(self, node: onnx.NodeProto, axis: int) -> tuple[NDArray[np.int8], Real, Constant]:
        source = self.producers.get(node.input[1])
        stored = None
        if source is not None and source.op_type == "DequantizeLinear":
            stored = self.constants.get(source.input[0])
        if source is None or stored is None:
            raise fault(node, "its weight is not dequantised from a constant")
        if stored.value.dtype != np.int8:
            raise fault(node, f"its weight reaches DequantizeLinear as {stored.value.dtype}; integer kernels need int8")
        scale = self.constant(source, 1)
        channels = stored.value.shape[axis]
        if scale.dtype != np.float32 or scale.size not in (1, channels):
            raise fault(node, f"its weight scale is {scale.dtype} {list(scale.shape)} for {channels} output channels")
        if not np.all((scale > 0) & (scale < np.inf)):
            raise fault(node, "its weight scale has a value that is not positive and finite")
        given = attributes_of(source).get("axis", 1)
        if scale.size > 1 and given % stored.value.ndim != axis:
            raise fault(node, f"its weight scale lies along axis {given}; output channels are axis {axis}")
        if len(source.input) > 2 and np.any(self.constant(source, 2)):
            raise fault(node, "its weight has a zero point that is not 0")
        return stored.value.astype(np.int8), scale.reshape(-1).astype(np.float32), stored

    def _bias(self, node: onnx.NodeProto, channels: int) -> tuple[NDArray[np.int32] | None, Real | None]:
        if len(node.input) < 3 or not node.input[2]:
            return None, None
        source = self.producers.get(node.input[2])
        stored = None
        if source is not None and source.op_type == "DequantizeLinear":
            stored = self.constants.get(source.input[0])
        if source is None or stored is None or stored.value.dtype != np.int32 or stored.value.size != channels:
            raise fault(node, f"its bias is not {channels} int32 values through a DequantizeLinear")
        return stored.value.astype(np.int32), self.constant(source, 1).reshape(-1).astype(np.float32)


def unit_of(weight: Constant, node: onnx.NodeProto) -> str:
    """The unit that a layer is: its weights carry the name."""
    return weight.source.split("/weight")[0] if "/weight" in weight.source else str(node.name)


def island_of(node_name: str, islands: Collection[str]) -> str | None:
    """The island whose name, and a slash, a node's name begins with; the longest where several do."""
    parts = node_name.split("/")
    names = ("/".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((name for name in names if name in islands), None)


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def fault(node: onnx.NodeProto, what: str) -> CheckError:
    """The error for a node that no integer kernel matches."""
    name = node.name or (node.output[0] if node.output else "")
    return CheckError(f"node {name!r} ({node.op_type}): {what}. Export the run again, unedited, with this version.")
