"""Which kernels of onnxruntime's optimised graph the nodes of the file became, and which of them compute in float.

onnxruntime names what it fuses after the nodes it fused, or after the tensor they wrote. So every node is named by its
place before onnxruntime sees the file; where only a tensor's name is left, the node that writes it stands for it; and a
node all of whose readers went into one kernel went there too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from mecdeploy.runtime_checks.op_types import INTEGER_PRODUCTS, MIXED_PRODUCTS, NOT_FLOAT, is_float
from mecdeploy.runtime_checks.patterns import Graph, attributes_of
from mecdeploy.runtime_checks.runtime import Refusal, optimized_graph

_MARK = re.compile(r"@node:(\d+)@")
_ADDED = re.compile(r"^InsertedPrecisionFreeCast_|(_token_\d+|_nchwc)+$")
_LARGEST = 2**31
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_WRITES: dict[str, int] = {
    **dict.fromkeys(("DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"), TensorProto.FLOAT),
    **dict.fromkeys(("QuantizeLinear", "DynamicQuantizeLinear", "QLinearMatMul"), TensorProto.UINT8),
    **dict.fromkeys(("ConvInteger", "MatMulInteger"), TensorProto.INT32),
    **dict.fromkeys(("Shape", "Size", "NonZero", "ArgMax", "ArgMin"), TensorProto.INT64),
    **dict.fromkeys(
        ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not"), TensorProto.BOOL
    ),
}
"""Op types whose output has a type of its own, signed or not; the others write what they read."""


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """graph: the optimised graph. sources: for each of its nodes, the nodes of the file it was made from, in order."""

    graph: onnx.GraphProto
    sources: tuple[tuple[int, ...], ...]

    def kernels(self, index: int) -> list[onnx.NodeProto]:
        """The nodes of the optimised graph that node `index` of the file went into."""
        return [node for node, made_from in zip(self.graph.node, self.sources, strict=True) if index in made_from]

    def islands(self) -> list[list[int]]:
        """Nodes of the optimised graph that compute in float, grouped: one writes in float what another reads.

        Operators that only move floats join what they stand between. Positions in graph.node.
        """
        types = _types(self.graph)
        member, parent = {}, {}
        for index, node in enumerate(self.graph.node):
            moves = node.op_type in NOT_FLOAT and node.op_type not in (*INTEGER_PRODUCTS, "DequantizeLinear")
            floats = any(types.get(name) in _FLOATS for name in node.output if name)
            if floats and (moves or is_float(node)) or node.op_type in MIXED_PRODUCTS:
                parent[index] = index
                member.update({name: index for name in node.output if name})

        def root(index: int) -> int:
            while parent[index] != index:
                index = parent[index]
            return index

        for index in parent:
            for name in self.graph.node[index].input:
                if name in member:
                    parent[root(index)] = root(member[name])
        groups: dict[int, list[int]] = defaultdict(list)
        for index in parent:
            groups[root(index)].append(index)
        return [group for group in groups.values() if any(is_float(self.graph.node[index]) for index in group)]


def attribute(proto: onnx.ModelProto, label: str) -> Attribution:
    """Have onnxruntime optimise the model, and find where its nodes went. Refusal if onnxruntime refuses it."""
    if proto.ByteSize() >= _LARGEST:
        raise Refusal(label, "2 GiB or more with its external data, which no protobuf message holds")
    names = [node.name for node in proto.graph.node]
    try:
        for index, node in enumerate(proto.graph.node):
            node.name = f"@node:{index}@"
        optimized = optimized_graph(proto.SerializeToString(), label)
    finally:
        for node, name in zip(proto.graph.node, names, strict=True):
            node.name = name
    graph = Graph(proto.graph)
    writer = {name: index for index, node in enumerate(proto.graph.node) for name in node.output if name}
    owners: dict[int, set[int]] = defaultdict(set)
    # what only brings a kernel's output into another layout comes last: the tensor it writes is that kernel's
    for position, kernel in sorted(enumerate(optimized.node), key=lambda item: item[1].op_type == "ReorderOutput"):
        for index in {*map(int, _MARK.findall(kernel.name)), *_written(kernel, writer)}:
            if kernel.op_type != "ReorderOutput" or index not in owners:
                owners[index].add(position)
    places = {id(node): index for index, node in enumerate(proto.graph.node)}
    for index in reversed(range(len(proto.graph.node))):
        node = proto.graph.node[index]
        if index not in owners and not graph.outputs.intersection(node.output):
            readers = [places[id(reader)] for name in node.output for reader in graph.consumers.get(name, ())]
            went = {position for reader in readers for position in owners.get(reader, {-1})}
            if len(went) == 1 and -1 not in went:
                owners[index] = went
    sources: list[list[int]] = [[] for _ in optimized.node]
    for index in sorted(owners):
        for position in owners[index]:
            sources[position].append(index)
    return Attribution(graph=optimized, sources=tuple(map(tuple, sources)))


def _written(kernel: onnx.NodeProto, writer: dict[str, int]) -> Iterable[int]:
    """Nodes of the file whose outputs a kernel writes, or is named after."""
    names = [*kernel.output, _ADDED.sub("", kernel.name)]
    return (writer[name] for name in names if name in writer)


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    """Element type of every tensor, by a rule for each op type; what is not known is left out."""
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    types.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    for node in graph.node:
        read = [types[name] for name in node.input if name in types]
        if node.op_type == "Cast":
            kind = attributes_of(node)["to"]
        elif node.op_type == "Constant":
            kind = next((item.t.data_type for item in node.attribute if item.name == "value"), TensorProto.FLOAT)
        elif node.op_type == "QGemm":
            kind = TensorProto.UINT8 if len(node.input) > 7 and node.input[7] else TensorProto.FLOAT
        elif node.op_type in _WRITES:
            kind = _WRITES[node.op_type]
        elif node.op_type.startswith("QLinear"):
            kind = TensorProto.UINT8
        else:
            kind = read[1 if node.op_type == "Where" and len(read) > 1 else 0] if read else TensorProto.FLOAT
        types.update({name: kind for name in node.output if name})
    return types
