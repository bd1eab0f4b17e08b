"""What onnxruntime makes of the file, and how the file stores its weights.

Both are measured: the kernels in the graph that onnxruntime optimised and saved, the bits in the initialisers' bytes.
The metadata is only what they are compared with.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import onnx

from mecdeploy.runtime_checks.model_file import ModelFile, ModelSource, read_model
from mecdeploy.runtime_checks.op_types import FLOAT_PRODUCTS, INTEGER_PRODUCTS, is_float
from mecdeploy.runtime_checks.patterns import Graph, Product, island_of
from mecdeploy.runtime_checks.runtime import optimized_graph

INT16_MAX = 32767

_RENAMED = re.compile(r"(_token_\d+|_nchwc)+$")


def original_name(name: str) -> str:
    """A node's or a tensor's name without what onnxruntime's optimiser appends to it."""
    return _RENAMED.sub("", name)


@dataclass(frozen=True, kw_only=True)
class WeightStorage:
    """One unit's weights as they lie in the file.

    bytes: of the packed weights, padding included. table_bytes: of the levels or codebook that this unit alone reads
    them through. bits: width of a weight in its storage. bits_per_weight: 8 * (bytes + table_bytes) / weights; what
    units share is left out.
    promised_bits: what the metadata says, None when it does not name the unit.
    """

    unit: str
    storage: str
    weights: int
    bytes: int
    table_bytes: int
    bits: int
    bits_per_weight: float
    promised_bits: int | None


@dataclass(frozen=True, kw_only=True)
class IslandStructure:
    """A float island: what the metadata says of it, and op type -> count of what the optimised graph holds of it.

    A node that the optimiser fused under another name is only in StructureReport.float_operators.
    """

    name: str
    operators: tuple[str, ...]
    reason: str
    kernels: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class StructureReport:
    """kernels: op type -> count in the optimised graph. integer_products, float_products: unit names.

    float_products: convolutions and products outside float islands. float_operators: op type -> count of everything in
    the optimised graph that neither computes in integers nor only moves values.
    saturation_risk: units whose pair sums could leave int16, where a CPU without VNNI saturates.
    """

    kernels: Mapping[str, int]
    integer_products: tuple[str, ...]
    float_products: tuple[str, ...]
    float_operators: Mapping[str, int]
    islands: tuple[IslandStructure, ...]
    weights: tuple[WeightStorage, ...]
    saturation_risk: tuple[str, ...]
    failures: tuple[str, ...]

    @property
    def packed_bits(self) -> dict[str, int]:
        """Unit -> bits its weights are packed at, measured."""
        return {row.unit: row.bits for row in self.weights}


def inspect_structure(model: ModelSource | ModelFile) -> StructureReport:
    """Optimise the model with onnxruntime, list its kernels, and measure how every weight is stored."""
    file = model if isinstance(model, ModelFile) else read_model(model)
    graph = Graph(file.proto.graph, file.islands)
    products = graph.products()
    names = {product.node.name: product.unit for product in products}
    optimized = optimized_graph(file.proto.SerializeToString(), file.label)
    integer = _find(optimized, INTEGER_PRODUCTS, names)
    floating = _outside_islands(_find(optimized, FLOAT_PRODUCTS, names), integer, products, file.islands)
    float_nodes = [node for node in optimized.node if is_float(node)]
    weights = tuple(_measure(graph, product, file.weight_bits) for product in products)
    return StructureReport(
        kernels=_count(optimized.node),
        integer_products=integer,
        float_products=floating,
        float_operators=_count(float_nodes),
        islands=tuple(
            IslandStructure(
                name=name,
                operators=island.operators,
                reason=island.reason,
                kernels=_count([node for node in float_nodes if island_of(node.name, file.islands) == name]),
            )
            for name, island in file.islands.items()
        ),
        weights=weights,
        saturation_risk=tuple(product.unit for product in products if _may_saturate(graph, product)),
        failures=(
            *_kernel_failures(products, integer, floating),
            *chain.from_iterable(map(_storage_failures, weights, products)),
            *_promise_failures(file, graph, weights),
            *chain.from_iterable(map(_bias_failures, products)),
        ),
    )


def _find(graph: onnx.GraphProto, kinds: tuple[str, ...], units: Mapping[str, str]) -> tuple[str, ...]:
    """Nodes of these op types by unit; the optimiser appends to names, and drops some."""
    found = []
    for node in graph.node:
        if node.op_type in kinds:
            name = original_name(node.name) or original_name(node.output[0])
            found.append(units.get(name, name))
    return tuple(found)


def _outside_islands(
    floating: tuple[str, ...], integer: tuple[str, ...], products: list[Product], islands: Collection[str]
) -> tuple[str, ...]:
    """Float products that no island accounts for.

    The optimiser drops some names: a nameless product is an island's where islands exist and every product of ours is
    found among the integer kernels.
    """
    units = {product.unit for product in products}
    if islands and units <= set(integer):
        return tuple(name for name in floating if name in units)
    return tuple(name for name in floating if island_of(name, islands) is None)


def _count(nodes: Iterable[onnx.NodeProto]) -> dict[str, int]:
    return dict(sorted(Counter(node.op_type for node in nodes).items()))


def _measure(graph: Graph, product: Product, promised: Mapping[str, int]) -> WeightStorage:
    count = product.weight.size
    tables = graph.own_tables(product.stored)
    return WeightStorage(
        unit=product.unit,
        storage=product.stored.storage,
        weights=count,
        bytes=product.stored.stored_bytes,
        table_bytes=tables,
        bits=product.stored.bits,
        bits_per_weight=8 * (product.stored.stored_bytes + tables) / count,
        promised_bits=promised.get(product.unit),
    )


def _kernel_failures(products: list[Product], integer: tuple[str, ...], floating: tuple[str, ...]) -> list[str]:
    missing = [product.unit for product in products if product.unit not in integer]
    if not floating and not missing:
        return []
    return [
        f"onnxruntime runs {len(products) - len(missing)} of {len(products)} convolutions and Gemms in integers; "
        f"in float: {', '.join(floating or missing)}. Export the run again: their biases, scales or clips were changed."
    ]


def _storage_failures(row: WeightStorage, product: Product) -> list[str]:
    failures = []
    if row.bits != row.promised_bits:
        promised = "nothing" if row.promised_bits is None else f"{row.promised_bits} bits"
        failures.append(
            f"{row.unit}: the weights are stored at {row.bits} bits, the metadata promises {promised}. "
            "Export the run again."
        )
    full = -(-row.weights // product.stored.per_code) * product.stored.code_bytes
    if row.bytes > full:
        failures.append(
            f"{row.unit}: {row.weights} weights take {row.bytes} bytes where {full} hold them at {row.bits} bits. "
            "Export the run again: they should be raw data."
        )
    return failures


def _promise_failures(file: ModelFile, graph: Graph, weights: tuple[WeightStorage, ...]) -> list[str]:
    stored = {row.unit for row in weights}
    failures = [
        f"{name}: the metadata names this unit, but the graph has no weights for it. Export the run again."
        for name in file.weight_bits
        if name not in stored
    ]
    tensors = graph.tensors()
    for name in dict.fromkeys((*file.units, *file.float_values)):
        if name not in tensors:
            failures.append(f"{name}: the metadata lists this tensor, but no node writes it. Export the run again.")
            continue
        if not graph.is_stored(name):
            continue
        bits, promised = graph.code_range(name)[1].bit_length(), file.activation_bits.get(name)
        if bits != promised:
            failures.append(
                f"{name}: the integers are held at {bits} bits, the metadata promises "
                f"{'nothing' if promised is None else f'{promised} bits'}. Export the run again."
            )
    return failures


def _bias_failures(product: Product) -> list[str]:
    """A bias is in steps of f32(s_x * s_w), exactly.

    onnxruntime reads the integers alone once it has fused: 1.24 at any written scale, 1.32 at any for a Gemm and within
    1% for a convolution. Other readers rely on the scale.
    """
    if product.bias_scale is None:
        return []
    expected = product.input.scale * product.weight_scale
    if np.array_equal(product.bias_scale, expected):
        return []
    return [
        f"{product.unit}: the bias scale is not input scale times weight scale, so one of the three was changed. "
        "Export the run again."
    ]


def _may_saturate(graph: Graph, product: Product) -> bool:
    largest_weight = max(int(product.weight.max(initial=0)), -int(product.weight.min(initial=0)))
    return 2 * graph.code_range(product.input.tensor)[1] * largest_weight > INT16_MAX
