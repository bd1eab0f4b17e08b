"""`inspect_model`: the facts about any ONNX file, and what onnxruntime makes of it. Nothing is demanded of the file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import onnx.inliner
import onnxruntime

from mecdeploy.runtime_checks.activations import input_of, output_of
from mecdeploy.runtime_checks.attribution import Attribution, attribute
from mecdeploy.runtime_checks.cautions import broken_promises, cautions
from mecdeploy.runtime_checks.file_facts import facts, promises, read_external
from mecdeploy.runtime_checks.inspection_report import (
    FloatIsland,
    InspectionReport,
    LayerFacts,
    Promises,
    Reason,
    RuntimeFacts,
)
from mecdeploy.runtime_checks.layers import (
    OPERANDS,
    bias_of,
    find_weight,
    label,
    measure,
    weight_index,
)
from mecdeploy.runtime_checks.model_file import parse_model
from mecdeploy.runtime_checks.op_types import FLOAT_PRODUCTS, INTEGER_PRODUCTS, MIXED_PRODUCTS, is_float
from mecdeploy.runtime_checks.patterns import Graph, island_of, unit_of
from mecdeploy.runtime_checks.reasons import computes, quantizes, why_float, why_island
from mecdeploy.runtime_checks.runtime import Refusal

NOTHING_QUANTISED = Reason(
    kind="nothing-quantised", what="the file holds no QuantizeLinear or DequantizeLinear: nothing in it is quantised"
)


def inspect_model(path: str | Path) -> InspectionReport:
    """Read a model file, have onnxruntime optimise it, and say what is in it and what became of it.

    Raises CheckError for what is no ONNX file. One that onnxruntime refuses is: report.runtime.error says why; it has
    layers if it keeps to the ONNX standard.
    """
    path = Path(path)
    _, proto, size = parse_model(path)
    file = facts(path, size, proto)
    read_external(path, proto)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    graph = Graph(proto.graph)
    try:
        attribution, error = attribute(proto, path.name), None
    except Refusal as refusal:
        attribution, error = None, refusal.reason
    metadata, nodes = promises(proto), proto.graph.node
    sound = attribution is not None or _is_valid(proto)
    layers = dict(_layers(graph, attribution, ours=metadata is not None)) if sound else {}
    return InspectionReport(
        file=replace(file, parameters=sum(map(_parameters, layers.values()))),
        runtime=_runtime(graph, attribution, error, metadata),
        layers=tuple(layers.values()),
        metadata=metadata,
        warnings=tuple(
            warning
            for index, layer in layers.items()
            for warning in (*cautions(graph, nodes[index], layer), *broken_promises(layer, metadata))
        ),
    )


def _is_valid(proto: onnx.ModelProto) -> bool:
    """Whether every node has the inputs, outputs and attributes that ONNX demands of it."""
    try:
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError):
        return False
    return True


def _layers(graph: Graph, attribution: Attribution | None, *, ours: bool) -> Iterator[tuple[int, LayerFacts]]:
    """Every node that multiplies with weights of the file, by its place. ours: names are those of the units."""
    quantized = quantizes(graph.proto)
    for index, node in enumerate(graph.proto.node):
        position = weight_index(graph, node)
        found = find_weight(graph, node, position) if position is not None else None
        if found is None:
            continue
        kernel = _kernel(attribution, index)
        arithmetic = _arithmetic(kernel) if kernel is not None else None
        bias, bias_size = bias_of(graph, node)
        reasons: tuple[Reason, ...] = ()
        if arithmetic in ("float", "mixed"):
            reasons = why_float(graph, node) if quantized else (NOTHING_QUANTISED,)
        layer = LayerFacts(
            name=unit_of(found.constant, node) if ours else label(node),
            op=node.op_type,
            kernel=kernel,
            arithmetic=arithmetic,
            weights=measure(graph, node, found),
            input=input_of(graph, node),
            output=output_of(graph, node),
            bias=bias,
            bias_size=bias_size,
            reasons=reasons,
        )
        yield index, layer


def _runtime(
    graph: Graph, attribution: Attribution | None, error: str | None, metadata: Promises | None
) -> RuntimeFacts:
    products: dict[str, list[str]] = {"integer": [], "mixed": [], "float": []}
    for index, node in enumerate(graph.proto.node):
        kernel = _kernel(attribution, index) if node.op_type in OPERANDS else None
        if kernel is not None:
            products[_arithmetic(kernel)].append(label(node))
    return RuntimeFacts(
        version=onnxruntime.__version__,
        error=error,
        kernels=_count(attribution.graph.node) if attribution is not None else {},
        integer_products=tuple(products["integer"]),
        mixed_products=tuple(products["mixed"]),
        float_products=tuple(products["float"]),
        islands=tuple(_islands(graph, attribution, metadata)) if attribution is not None else (),
    )


def _islands(graph: Graph, attribution: Attribution, metadata: Promises | None) -> Iterator[FloatIsland]:
    """In the order of the file."""
    quantized = quantizes(graph.proto)
    found = []
    for island in attribution.islands():
        indices = sorted({index for position in island for index in attribution.sources[position]})
        nodes = [graph.proto.node[index] for index in indices]
        nodes = [node for node in nodes if computes(node)] or nodes
        kernels = _count(node for node in map(attribution.graph.node.__getitem__, island) if is_float(node))
        reasons = why_island(graph, nodes) if quantized else (NOTHING_QUANTISED,)
        if exported := _exported(nodes, metadata):
            reasons = (*exported, *(reason for reason in reasons if reason.kind != "unquantised-inside"))
        reasons = reasons or (_unexplained(kernels),)
        found.append((indices, FloatIsland(kernels=kernels, nodes=tuple(map(label, nodes)), reasons=reasons)))
    return (island for _, island in sorted(found, key=lambda one: one[0]))


def _exported(nodes: Sequence[onnx.NodeProto], metadata: Promises | None) -> tuple[Reason, ...]:
    """Why mecdeploy's export left these nodes in float, as its metadata says; each cause once."""
    described = (metadata.islands or {}) if metadata is not None else {}
    names = dict.fromkeys(island_of(node.name, described) for node in nodes)
    causes = dict.fromkeys(described[name] for name in names if name is not None)
    return (Reason(kind="exported-island", what=f"exported so: {', '.join(causes)}"),) if causes else ()


def _unexplained(kernels: Mapping[str, int]) -> Reason:
    return Reason(kind="unknown", what=f"onnxruntime put it there itself: {', '.join(kernels)}")


def _kernel(attribution: Attribution | None, index: int) -> str | None:
    """What multiplies in place of a node of the file: the product among the kernels that it went into."""
    if attribution is None:
        return None
    kernels = [node.op_type for node in attribution.kernels(index)]
    return next((kernel for kernel in kernels if kernel in (*INTEGER_PRODUCTS, *FLOAT_PRODUCTS)), None)


def _arithmetic(kernel: str) -> str:
    if kernel in INTEGER_PRODUCTS:
        return "integer"
    return "mixed" if kernel in MIXED_PRODUCTS else "float"


def _parameters(layer: LayerFacts) -> int:
    return math.prod(layer.weights.shape) + layer.bias_size


def _count(nodes: Iterable[onnx.NodeProto]) -> dict[str, int]:
    return dict(Counter(node.op_type for node in nodes).most_common())
