"""Small damages to IntegerGraphs, each of which breaks one rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mecdeploy.export.graph import IntegerGraph, Node

Damage = Callable[[IntegerGraph], IntegerGraph]


def node(name: str, /, **changes: Any) -> Damage:
    """Change fields of one node."""

    def damage(graph: IntegerGraph) -> IntegerGraph:
        assert any(one.name == name for one in graph.nodes)
        nodes: tuple[Node, ...] = tuple(replace(one, **changes) if one.name == name else one for one in graph.nodes)
        return replace(graph, nodes=nodes)

    return damage


def weight(name: str, /, **changes: Any) -> Damage:
    """Change fields of one node's weight; a callable makes the new field from the old one."""

    def damage(graph: IntegerGraph) -> IntegerGraph:
        (old,) = (one.weight for one in graph.nodes if one.name == name)  # type: ignore[union-attr]
        made = {key: value(getattr(old, key)) if callable(value) else value for key, value in changes.items()}
        return node(name, weight=replace(old, **made))(graph)

    return damage


def value(name: str, /, **changes: Any) -> Damage:
    """Change fields of one value, or of its quantization."""

    def damage(graph: IntegerGraph) -> IntegerGraph:
        old = graph.values[name]
        own = {key: change for key, change in changes.items() if key in ("name", "shape", "quantization", "batch_axis")}
        if len(own) < len(changes):
            assert old.quantization is not None
            own["quantization"] = replace(
                old.quantization, **{key: change for key, change in changes.items() if key not in own}
            )
        return replace(graph, values={**graph.values, name: replace(old, **own)})

    return damage
