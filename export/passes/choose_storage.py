"""How each weight's packed bits are written, so that the target folds them to int8 when it loads the file."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from mecdeploy.export.config import ExportConfig
from mecdeploy.export.graph import Conv, Gemm, IntegerGraph, Weight

STORAGES = MappingProxyType(
    {
        "onnxruntime": MappingProxyType({8: "int8", 4: "int4", 3: "table", 2: "int2"}),
        "portable": MappingProxyType({8: "int8", 4: "table", 3: "table", 2: "table"}),
    }
)
"""target -> packed bits -> storage. ONNX has no 3-bit type, so 3 bits are a table everywhere."""


def choose_storage(graph: IntegerGraph, config: ExportConfig) -> IntegerGraph:
    """Set every weight's storage from config.target and its packed_bits; levels are a table everywhere."""
    return replace(
        graph,
        nodes=tuple(
            replace(node, weight=replace(node.weight, storage=_storage(node.weight, config.target)))
            if isinstance(node, Conv | Gemm)
            else node
            for node in graph.nodes
        ),
    )


def _storage(weight: Weight, target: str) -> str:
    return "table" if weight.packed_levels is not None else STORAGES[target][weight.packed_bits]
