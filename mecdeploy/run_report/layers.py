"""The layers of an exported file, read from its graph: what each computes, what it reads, and how it quantises."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx

from mecdeploy.runtime_checks.model_file import PIXELS, ModelFile
from mecdeploy.runtime_checks.patterns import MOVING, Graph, Product, attributes_of

_TRANSPARENT = ("DequantizeLinear", "QuantizeLinear", "Clip")
"""What only says how integers stand for reals, or where they end."""


@dataclass(frozen=True, kw_only=True)
class FileValue:
    """Stored codes lowest..highest of one tensor. made: quantised here, not moved from elsewhere."""

    tensor: str
    scale: float
    zero_point: int
    lowest: int
    highest: int
    made: bool


@dataclass
class FileLayer:
    """A layer of the file under the name that its nodes begin with. reads: layers, in the order they are read."""

    name: str
    island: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    values: list[FileValue] = field(default_factory=list)
    product: Product | None = None

    @property
    def kernel(self) -> str:
        """What it computes, in words: "Conv 3x3, 16 to 32, stride 2", or its operators."""
        if self.product is None:
            return ", ".join(dict.fromkeys(node.op_type for node in self.nodes))
        return describe(self.product)


def layers_of(file: ModelFile) -> list[FileLayer]:
    """Every layer of a file of ours, in execution order, islands among them. Raises CheckError for other patterns."""
    graph = Graph(file.proto.graph, file.islands)
    products = {product.node.name: product for product in graph.products()}
    home = {file.input_name: PIXELS}  # of every tensor that depends on the pixels: the layer that made its values
    layers: dict[str, FileLayer] = {}
    for node in graph.proto.node:
        sources = [name for name in node.input if name in home]
        if not sources:
            continue  # a constant, folded when the file is loaded
        island = graph.island(node)
        product = products.get(node.name)
        if island is None and node.op_type in _TRANSPARENT:
            name = home[sources[0]]
        else:
            name = island or (product.unit if product is not None else node.name.split("/")[0])
            layer = layers.setdefault(name, FileLayer(name=name, island=island is not None))
            layer.nodes.append(node)
            layer.product = layer.product or product
            read = (home[source] for source in sources)
            layer.reads += [source for source in dict.fromkeys(read) if source not in (name, *layer.reads)]
        for output in node.output:
            home[output] = name
            if name in layers and output in file.activation_bits:
                layers[name].values.append(_value(graph, output))
    return list(layers.values())


def describe(product: Product) -> str:
    """A convolution or Gemm in words."""
    outputs, inputs, *kernel = product.weight.shape
    if not kernel:
        return f"Gemm, {inputs} to {outputs}"
    attributes = attributes_of(product.node)
    groups, strides = attributes.get("group", 1), attributes.get("strides", [1])
    words = [f"Conv {'x'.join(map(str, kernel))}", f"{inputs * groups} to {outputs}"]
    if set(strides) != {1}:
        words.append(f"stride {'x'.join(map(str, dict.fromkeys(strides)))}")
    if groups > 1:
        words.append(f"{groups} groups")
    return ", ".join(words)


def _value(graph: Graph, tensor: str) -> FileValue:
    """Its quantisation, by the node that quantised it, seen through those that only move codes."""
    node, made = graph.producers[tensor], True
    while node.op_type != "QuantizeLinear":
        made &= node.op_type == "Clip"
        source = node.input[0]
        if source not in graph.producers:  # the pixels themselves, moved
            node = next(reader for reader in graph.consumers[source] if reader.op_type == "DequantizeLinear")
            break
        node = graph.producers[source]
    found, (lowest, highest) = graph.quantization(node, tensor), _bounds(graph, tensor)
    return FileValue(
        tensor=tensor,
        scale=float(found.scale),
        zero_point=found.zero_point,
        lowest=lowest,
        highest=highest,
        made=made,
    )


def _bounds(graph: Graph, tensor: str) -> tuple[int, int]:
    """The codes that a stored tensor can hold: those of its Clip, else of all that is moved into it, else a byte's."""
    node = graph.producers.get(tensor)
    if node is None or node.op_type not in MOVING:
        return 0, 255
    if node.op_type == "Clip":
        given = {index for index, name in enumerate(node.input) if name}
        low, high = (int(graph.constant(node, i).item()) if i in given else bound for i, bound in ((1, 0), (2, 255)))
        return low, high
    sources = node.input if node.op_type == "Concat" else node.input[:1]
    bounds = [_bounds(graph, source) for source in sources]
    return min(low for low, _ in bounds), max(high for _, high in bounds)
