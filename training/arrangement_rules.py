"""Rules for what lays codes out anew: stacks, shuffles, and enlargement by repetition."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import fx

from mecdeploy.training.arguments import IN_FLOAT, Arguments, Rule
from mecdeploy.training.movement_rules import DIFFERENT_BOUNDS, bounds, is_pixels
from mecdeploy.training.plans import Value
from mecdeploy.training.tracing import shape_of

if TYPE_CHECKING:
    from mecdeploy.training.planning import Planner


def _stack(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    values = [planner.codes(tensor) for tensor in a["tensors"]]
    known = [value for value in values if value is not None]
    shape = shape_of(node)
    axis = int(a["dim"]) % len(shape)
    if len(known) != len(values) or len({is_pixels(value) for value in known}) > 1:
        return "it joins a constant or a float value"
    if axis == 0:
        return "it joins batches"
    if len(bounds(known)) > 1:
        return DIFFERENT_BOUNDS
    name = planner.name_of(node)
    one = tuple(1 if place == axis else int(size) for place, size in enumerate(shape) if place > 0)
    parts = [planner.add_plan(name, "reshape", [value], options={"shape": one}) for value in known]
    return planner.add_plan(name, "concat", parts, options={"axis": axis}) if len(parts) > 1 else parts[0]


def _channel_shuffle(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a.get("self", a.get("input")))
    if x is None:
        return IN_FLOAT
    _, channels, height, width = shape_of(node)
    groups = int(a["groups"])
    return _regrouped(planner, node, x, (groups, channels // groups, height, width), (0, 2, 1, 3, 4))


def _pixel_shuffle(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a["self"])
    if x is None or len(shape_of(node)) != 4:
        return IN_FLOAT
    (_, _, height, width), factor = shape_of(a["self"]), int(a["upscale_factor"])
    split = (int(shape_of(node)[1]), factor, factor, height, width)
    return _regrouped(planner, node, x, split, (0, 1, 4, 2, 5, 3))


def _pixel_unshuffle(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a["self"])
    if x is None or len(shape_of(node)) != 4:
        return IN_FLOAT
    (_, _, height, width), factor = shape_of(node), int(a["downscale_factor"])
    split = (int(shape_of(a["self"])[1]), height, factor, width, factor)
    return _regrouped(planner, node, x, split, (0, 1, 3, 5, 2, 4))


def _regrouped(
    planner: Planner, node: fx.Node, x: Value, split: tuple[int, ...], permutation: tuple[int, ...]
) -> Value:
    """Axes split as [N, *split], permuted, and joined to the node's shape."""
    name, shape = planner.name_of(node), tuple(shape_of(node)[1:])
    parts = planner.add_plan(name, "reshape", [x], options={"shape": split})
    turned = planner.add_plan(name, "transpose", [parts], options={"permutation": permutation})
    return planner.add_plan(name, "reshape", [turned], options={"shape": shape})


def _nearest(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    source = a.get("self", a.get("input"))
    x = planner.codes(source)
    if x is None or not isinstance(source, fx.Node):
        return IN_FLOAT
    size, wanted = shape_of(source)[2:], shape_of(node)[2:]
    if any(not isinstance(extent, int) for extent in (*size, *wanted)) or wanted[0] % size[0] or wanted[1] % size[1]:
        return f"enlarging {tuple(size)} positions to {tuple(wanted)} repeats some more often than others"
    if any(given != wanted[axis] / size[axis] for axis, given in enumerate(a.get("scale_factors") or ())):
        return f"scale_factor {a['scale_factors']} is no whole number"
    return repeated(planner, node, x, tuple(size), (wanted[0] // size[0], wanted[1] // size[1]))


def repeated(planner: Planner, node: fx.Node, x: Value, size: tuple[int, ...], times: tuple[int, int]) -> Value:
    """[N, C, H, W] -> [N, C, H * times[0], W * times[1]]: every code several times, by joining it with itself."""
    name, (_, channels, *wanted) = planner.name_of(node), shape_of(node)
    if times == (1, 1):
        return x
    apart = (channels, size[0], 1, size[1], 1)
    value = planner.add_plan(name, "reshape", [x], options={"shape": apart})
    for axis, count in ((3, times[0]), (5, times[1])):
        if count > 1:
            value = planner.add_plan(name, "concat", [value] * count, options={"axis": axis})
    return planner.add_plan(name, "reshape", [value], options={"shape": (channels, *wanted)})


ARRANGEMENT: Mapping[str, Rule] = MappingProxyType(
    {
        "stack": _stack,
        "upsample_nearest2d": _nearest,
        "_upsample_nearest_exact2d": _nearest,
        "pixel_shuffle": _pixel_shuffle,
        "pixel_unshuffle": _pixel_unshuffle,
        "channel_shuffle": _channel_shuffle,
        "native_channel_shuffle": _channel_shuffle,
    }
)
