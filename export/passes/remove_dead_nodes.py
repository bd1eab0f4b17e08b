"""Drop what no path to the graph's output reads."""

from __future__ import annotations

from dataclasses import replace

from mecdeploy.export.config import ExportConfig
from mecdeploy.export.graph import Add, IntegerGraph, Node, inputs_of, outputs_of


def remove_dead_nodes(graph: IntegerGraph, config: ExportConfig) -> IntegerGraph:
    """Keep the nodes, the outputs of Adds and the values that the graph's output depends on, and its input.

    A FloatIsland keeps all its outputs while one is read: what its inside spends on the others, runtimes drop.
    """
    needed = {graph.output}
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        read = tuple(name for name in outputs_of(node) if name in needed)
        if read:
            kept.append(replace(node, outputs=read) if isinstance(node, Add) else node)
            needed.update((*inputs_of(node), *outputs_of(kept[-1])))
    needed.add(graph.input)
    values = {name: value for name, value in graph.values.items() if name in needed}
    return replace(graph, nodes=tuple(reversed(kept)), values=values)
