"""Activations written out by hand, as the operators that they are: x * relu6(x + 3) / 6 is hardswish(x)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mecdeploy.training.tracing import Trace, operator_name

_SIXTH_TOLERANCE = 1e-6
"""Of 1: how far from it 6 * k may be for a constant k that was written as 1 / 6 or 0.1666667."""


def recognise_hard_sigmoids(trace: Trace) -> None:
    """Replace relu6(x + 3) / 6, also where a factor comes before the division, by hardsigmoid(x).

    clamp(x + 3, 0, 6) and * (1 / 6) are the same. Nothing else may read what is in between.
    """
    for clip in list(trace.nodes):
        total = clip.args[0] if _clips_to_six(clip) else None
        if not isinstance(total, fx.Node) or not _adds_three(total) or not _is_inner(trace, total):
            continue
        ends = [_division_behind(trace, clip, reader) for reader in clip.users]
        if ends and all(end is not None for end in ends):
            _replace(trace, clip, total)


def _replace(trace: Trace, clip: fx.Node, total: fx.Node) -> None:
    with clip.graph.inserting_after(clip):
        gate = clip.graph.call_function(torch.ops.aten.hardsigmoid.default, (total.args[0],))
    gate.meta = dict(clip.meta)
    trace.nodes.insert(trace.nodes.index(clip), gate)
    for reader in list(clip.users):
        division = _division_behind(trace, clip, reader)
        assert division is not None
        product = None if division is reader else reader
        if product is not None:
            product.replace_input_with(clip, gate)
        result = gate if product is None else product
        division.replace_all_uses_with(result)
        trace.nodes.remove(division)
        trace.output = result if trace.output is division else trace.output
    trace.nodes.remove(clip)
    trace.nodes.remove(total)


def _division_behind(trace: Trace, clip: fx.Node, reader: fx.Node) -> fx.Node | None:
    """The division by 6 that follows a clip, at once or after one product."""
    if _divides_by_six(reader, clip):
        return reader
    if _name(reader) == "mul" and _is_inner(trace, reader) and all(isinstance(a, fx.Node) for a in reader.args):
        (last,) = reader.users
        return last if _divides_by_six(last, reader) else None
    return None


def _is_inner(trace: Trace, node: fx.Node) -> bool:
    return len(node.users) == 1 and node is not trace.output


def _clips_to_six(node: fx.Node) -> bool:
    bounds = tuple(_number(argument) for argument in node.args[1:3])
    return _name(node) == "relu6" or (_name(node) in ("hardtanh", "clamp") and bounds == (0.0, 6.0))


def _adds_three(node: fx.Node) -> bool:
    return _name(node) == "add" and isinstance(node.args[0], fx.Node) and _number(node.args[1]) == 3.0


def _divides_by_six(node: fx.Node, dividend: fx.Node) -> bool:
    if node.args[:1] != (dividend,) or len(node.args) != 2 or node.kwargs:
        return False
    number = _number(node.args[1])
    if number is None:
        return False
    return (_name(node) == "div" and number == 6.0) or (
        _name(node) == "mul" and abs(6.0 * number - 1.0) < _SIXTH_TOLERANCE
    )


def _name(node: fx.Node) -> str:
    return operator_name(node).rstrip("_")


def _number(argument: Any) -> float | None:
    return float(argument) if isinstance(argument, int | float) else None
