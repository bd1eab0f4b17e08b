"""What every rule for an operator works with: the arguments by name, and reasons why a node stays in float."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import fx

from mecdeploy.training.plans import Value

if TYPE_CHECKING:
    from mecdeploy.training.planning import Planner

Arguments: TypeAlias = dict[str, Any]
Rule: TypeAlias = "Callable[[Planner, fx.Node, Arguments], Value | str | None]"

IN_FLOAT = "its input is float"
ACROSS_IMAGES = "it moves values across the axis of the images"


def arguments_of(node: fx.Node) -> Arguments:
    """A node's arguments by the names of its operator's schema, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(node.kwargs)
    found: Arguments = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            found[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


def constant(planner: Planner, argument: Any) -> Any:
    """A constant's value; None for none, and for what the pixels reach."""
    try:
        return None if argument is None else planner.trace.constant(argument)
    except KeyError:
        return None
