"""The passes: each a function (graph, config) -> graph, one rewrite a file. PASSES is the recipe, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from mecdeploy.export.config import ExportConfig
from mecdeploy.export.errors import ExportError
from mecdeploy.export.graph import IntegerGraph
from mecdeploy.export.passes.choose_packed_bits import choose_packed_bits
from mecdeploy.export.passes.choose_storage import choose_storage
from mecdeploy.export.passes.remove_dead_nodes import remove_dead_nodes
from mecdeploy.export.passes.split_add_outputs import split_add_outputs
from mecdeploy.export.passes.write_out_ceil_mode import write_out_ceil_mode
from mecdeploy.export.validation import validate_graph

__all__ = ["PASSES", "Pass", "run_passes"]

Pass: TypeAlias = Callable[[IntegerGraph, ExportConfig], IntegerGraph]

PASSES: tuple[Pass, ...] = (
    remove_dead_nodes,
    split_add_outputs,
    write_out_ceil_mode,
    choose_packed_bits,
    choose_storage,
)


def run_passes(graph: IntegerGraph, config: ExportConfig, passes: Sequence[Pass] = PASSES) -> IntegerGraph:
    """Apply passes in order, validating before the first and after each.

    Raises ExportError: the graph's own, a pass's refusal, or, naming the pass, what it broke.
    """
    validate_graph(graph)
    for rewrite in passes:
        graph = rewrite(graph, config)
        try:
            validate_graph(graph)
        except ExportError as error:
            name = getattr(rewrite, "__name__", repr(rewrite))
            raise ExportError(f"pass {name} broke the graph: {error}") from error
    return graph
