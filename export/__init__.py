"""The export room: a compiler from quantised units to one ONNX file with packed low-bit weights.

    lower(model)                    QuantizedModel -> IntegerGraph       capture.py (the only file that knows torch)
    compile_graph(graph, config)    IntegerGraph -> IntegerGraph         passes/, validated after each
    emit(graph, config, metadata)   IntegerGraph -> onnx.ModelProto      emission/
    export_model(...)               compile, emit, check: bytes          compiler.py

graph.py        IntegerGraph: frozen dataclasses, every node one integer kernel or a float island
validation.py   the rules it obeys as a whole; rules.py and weight_rules.py, what single nodes demand
shapes.py       the shapes nodes make; refusal.py, how a rule refuses
packing.py      2, 3 and 4 bits in bytes, and the tables that undo it
config.py       ExportConfig; errors.py, ExportError

Importing this package imports no torch; `lower` is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mecdeploy.export.compiler import compile_graph, export_model
from mecdeploy.export.config import ExportConfig
from mecdeploy.export.emission import emit
from mecdeploy.export.errors import ExportError
from mecdeploy.export.graph import IntegerGraph
from mecdeploy.export.validation import validate_graph

if TYPE_CHECKING:
    from mecdeploy.export.capture import lower

__all__ = [
    "ExportConfig",
    "ExportError",
    "IntegerGraph",
    "compile_graph",
    "emit",
    "export_model",
    "lower",
    "validate_graph",
]


def __getattr__(name: str) -> object:
    """Load `lower` on first use: it imports torch through the training room."""
    if name == "lower":
        from mecdeploy.export.capture import lower

        return lower
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
