"""How a rule refuses a node, and how it reads what wiring has made sure of."""

from __future__ import annotations

from typing import NoReturn

from mecdeploy.export.errors import ExportError
from mecdeploy.export.graph import IntegerGraph, Node, Quantization


def refuse(node: Node, problem: str) -> NoReturn:
    """Raise an ExportError that names the node's type and the node."""
    raise ExportError(f"{type(node).__name__} {node.name}: {problem}.")


def quantization_of(graph: IntegerGraph, name: str) -> Quantization:
    """The quantization of a value that validate_graph has found to have one."""
    quantization = graph.values[name].quantization
    assert quantization is not None
    return quantization
