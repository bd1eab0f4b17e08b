"""Float islands: pieces of float ONNX set into the model, and the quantise and dequantise nodes at their shores."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper

from mecdeploy.export.emission.barriers import BARRIER, needs_barrier
from mecdeploy.export.emission.builder import GraphBuilder
from mecdeploy.export.graph import Dequantize, FloatIsland, Quantize


def emit_float_island(builder: GraphBuilder, node: FloatIsland) -> None:
    """The nodes of the island's graph, named `<island>/...`; they read reals and write tensors named like values."""
    read = names_read(node.graph)
    names = {
        entry.name: _connect(builder, value, entry.type.tensor_type.elem_type)
        for entry, value in zip(node.graph.input, node.inputs, strict=True)
        if entry.name in read
    }
    for tensor in node.graph.initializer:
        if tensor.name in read:
            names[tensor.name] = builder.constant(tensor, f"{node.name}/{tensor.name}")
    written = {name for inner in node.graph.node for name in inner.output}
    copies = []
    for entry, value in zip(node.graph.output, node.outputs, strict=True):
        is_own = entry.name in written and entry.name not in names
        if is_own and not (value in builder.quantized_floats and needs_barrier(node.graph, entry.name)):
            names[entry.name] = value
        else:
            # what is an input, a constant or another output is copied too: a tensor has one name
            copies.append((entry.name, value))

    def rename(name: str) -> str:
        return names.get(name) or (name and f"{node.name}/{name}")

    for position, inner in enumerate(node.graph.node):
        builder.splice(_renamed(inner, f"{node.name}/{inner.name or position}", rename))
    for name, value in copies:
        builder.splice(helper.make_node(BARRIER, [rename(name)], [value], name=f"{node.name}/{value}"))


def emit_quantize(builder: GraphBuilder, node: Quantize) -> None:
    """QuantizeLinear of a float value, on its own."""
    builder.quantize(node.input, node.output)


def emit_dequantize(builder: GraphBuilder, node: Dequantize) -> None:
    """DequantizeLinear, on its own, named like the value."""
    builder.dequantize(node.input, real=node.output)


def names_read(graph: GraphProto) -> set[str]:
    """Names that nodes of the graph, or of graphs inside it, read, and its outputs."""
    read = {entry.name for entry in graph.output}
    for node in graph.node:
        read.update(node.input)
        for inner in _inner_graphs(node):
            read |= names_read(inner)
    return read


def _connect(builder: GraphBuilder, value: str, element: int) -> str:
    """The tensor that an input of an island stands for: codes as they are, or reals."""
    if element == TensorProto.UINT8 or builder.values[value].quantization is None:
        return value
    return builder.dequantize(value)


def _renamed(node: NodeProto, name: str, rename: Callable[[str], str]) -> NodeProto:
    """A copy of the node under another name, its tensors and those of graphs inside it renamed.

    Without what exporters write beside it: stack traces of the machine they ran on.
    """
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name = name
    copy.ClearField("doc_string")
    copy.ClearField("metadata_props")
    copy.input[:] = map(rename, node.input)
    copy.output[:] = map(rename, node.output)
    for inner in _inner_graphs(copy):
        _rename_graph(inner, name, rename)
    return copy


def _rename_graph(graph: GraphProto, name: str, rename: Callable[[str], str]) -> None:
    """The body of an If or a Loop, in place: it sees the names around it, so all are renamed alike."""
    for entry in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        entry.name = rename(entry.name)
    for position, node in enumerate(graph.node):
        node.CopyFrom(_renamed(node, f"{name}/{node.name or position}", rename))


def _inner_graphs(node: NodeProto) -> Iterable[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs
