"""Rules for what moves codes or leaves them as they are."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from mecdeploy.training.arguments import ACROSS_IMAGES, IN_FLOAT, Arguments, Rule, arguments_of
from mecdeploy.training.geometry import Geometry
from mecdeploy.training.plans import PASS_THROUGH, Value
from mecdeploy.training.tracing import operator_name, shape_of

if TYPE_CHECKING:
    from mecdeploy.training.planning import Planner

DIFFERENT_BOUNDS = "it joins values of different upper bounds, as of ReLU6 and ReLU, which one scale cannot have"
EVERYTHING = sys.maxsize
"""Where torch.export lets a slice stop that has no end."""


def _reshape(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    source = a.get("self", a.get("input"))
    x = planner.codes(source)
    if x is None or not isinstance(source, fx.Node):
        return IN_FLOAT
    if str(shape_of(source)[0]) != str(planner.trace.batch):
        return ACROSS_IMAGES
    return reshape_to(planner, node, x)


def reshape_to(planner: Planner, node: fx.Node, x: Value) -> Value | str:
    """A plan that lays out x's codes in the shape of a node."""
    batch, *sizes = shape_of(node)
    if str(batch) != str(planner.trace.batch) or any(not isinstance(size, int) for size in sizes):
        return ACROSS_IMAGES
    name = planner.name_of(node)
    if x.plan is not None and x.plan.name == name:
        name = f"{name}_flat"
    return planner.add_plan(name, "reshape", [x], options={"shape": tuple(sizes)})


def _permute(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    rank = len(shape_of(node))
    return _transposed(planner, node, a, [axis % rank for axis in a["dims"]])


def _transpose(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    rank = len(shape_of(node))
    axes = list(range(rank))
    first, second = (int(a[f"dim{i}"] if f"dim{i}" in a else a[f"axis{i}"]) % rank for i in (0, 1))
    axes[first], axes[second] = axes[second], axes[first]
    return _transposed(planner, node, a, axes)


def _transposed(planner: Planner, node: fx.Node, a: Arguments, axes: list[int]) -> Value | str:
    x = planner.codes(a["self"])
    if x is None:
        return IN_FLOAT
    if axes[0] != 0:
        return ACROSS_IMAGES
    return planner.add_plan(planner.name_of(node), "transpose", [x], options={"permutation": tuple(axes)})


def _slice(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    stop = a.get("end")
    return _cut(planner, node, a["self"], int(a["dim"]), a.get("start") or 0, stop, int(a["step"]))


def _narrow(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    if not isinstance(a["start"], int) or not isinstance(a["length"], int):
        return "its bounds depend on the image"
    return _cut(planner, node, a["self"], int(a["dim"]), a["start"], a["start"] + a["length"], 1)


def _select(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    axis, index = int(a["dim"]), a["index"]
    if not isinstance(index, int):
        return "its index depends on the image"
    size = shape_of(a["self"])[axis]
    index = index + size if index < 0 else index
    one = _cut(planner, node, a["self"], axis, index, index + 1, 1)
    return one if isinstance(one, str) else reshape_to(planner, node, one)


def _cut(planner: Planner, node: fx.Node, source: Any, axis: int, start: Any, stop: Any, step: int) -> Value | str:
    x = planner.codes(source)
    if x is None:
        return IN_FLOAT
    shape = shape_of(source)
    axis %= len(shape)
    if axis == 0 and start == 0 and (stop is None or stop == EVERYTHING) and step == 1:
        return x
    if axis == 0 or not isinstance(shape[axis], int) or not isinstance(start, int):
        return "it separates images of a batch"
    first, last, step = slice(start, stop, step).indices(shape[axis])
    if (first, last, step) == (0, shape[axis], 1):
        return x
    options = {"axis": axis, "start": first, "stop": last, "step": step}
    return planner.add_plan(planner.name_of(node), "slice", [x], options=options)


def _split(planner: Planner, node: fx.Node, a: Arguments) -> Value | str | None:
    """Chunk, split and unbind: their parts are cut where they are taken out."""
    if planner.codes(a["self"]) is None or int(a.get("dim", 0)) % len(shape_of(a["self"])) == 0:
        return IN_FLOAT
    return None


def _part(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    split, index = node.args[0], node.args[1]
    if not isinstance(split, fx.Node) or split in planner.floating or not isinstance(index, int):
        return IN_FLOAT
    given = arguments_of(split)
    if operator_name(split) == "adaptive_max_pool2d":
        return _pooled(planner, node, given) if index == 0 else "only values are pooled, not their places"
    axis = int(given.get("dim", 0)) % len(shape_of(given["self"]))
    parts = split.meta["val"]
    index %= len(parts)
    if operator_name(split) == "unbind":
        one = _cut(planner, node, given["self"], axis, index, index + 1, 1)
        return one if isinstance(one, str) else reshape_to(planner, node, one)
    start = sum(int(part.shape[axis]) for part in parts[:index])
    return _cut(planner, node, given["self"], axis, start, start + int(parts[index].shape[axis]), 1)


def _pooled(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x, size, wanted = planner.codes(a["self"]), shape_of(a["self"])[-2:], shape_of(node)[-2:]
    return IN_FLOAT if x is None else tiled_maximum(planner, node, x, (size[0] // wanted[0], size[1] // wanted[1]))


def tiled_maximum(planner: Planner, node: fx.Node, x: Value, kernel: tuple[int, int]) -> Value:
    """A plan for the maximum over windows that lie side by side."""
    options = {"kernel": kernel, "geometry": Geometry(stride=kernel, padding=(0, 0, 0, 0)), "ceil_mode": False}
    return planner.add_plan(planner.name_of(node), "max_pool", [x], options=options)


def _cat(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    tensors = list(a["tensors"])
    values = [planner.codes(tensor) for tensor in tensors]
    known = [value for value in values if value is not None]
    axis = int(a["dim"]) % len(shape_of(node))
    if len(known) != len(values):
        return "it joins a constant or a float value"
    if axis == 0:
        return "it joins batches"
    if len({is_pixels(value) for value in known}) > 1:
        return "it joins raw pixels with other values"
    if len(bounds(known)) > 1:
        return DIFFERENT_BOUNDS
    if len(known) == 1:
        return known[0]
    return planner.add_plan(planner.name_of(node), "concat", known, options={"axis": axis})


def bounds(values: Iterable[Value]) -> set[float | None]:
    """Upper bounds that the kernels of the values' makers leave to their quantisers; a sigmoid keeps to 1 itself."""
    found: set[float | None] = set()
    for plan in (value.plan for value in values if value.plan is not None):
        if plan.kind in PASS_THROUGH:
            found |= bounds(plan.inputs)
        else:
            found.add(None if plan.options.get("function") == "sigmoid" else plan.maximum)
    return found


def is_pixels(value: Value) -> bool:
    """Whether a value's codes are the image's own, whose scale nothing else can share."""
    if value.plan is None:
        return True
    return value.plan.kind in PASS_THROUGH and any(is_pixels(source) for source in value.plan.inputs)


def _dropout(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.read(a.get("input", a.get("self")))
    if x is None:
        return IN_FLOAT
    value = planner.add_plan(planner.name_of(node), "dropout", [x], options={"probability": float(a["p"])})
    value.codes = x.codes
    return value


def _cast(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a.get("self", a.get("input")))
    if x is None or node.meta["val"].dtype != torch.float32:
        return IN_FLOAT
    return x


MOVEMENT: Mapping[str, Rule] = MappingProxyType(
    {
        "view": _reshape,
        "reshape": _reshape,
        "_unsafe_view": _reshape,
        "flatten": _reshape,
        "unflatten": _reshape,
        "squeeze": _reshape,
        "unsqueeze": _reshape,
        "permute": _permute,
        "transpose": _transpose,
        "swapaxes": _transpose,
        "swapdims": _transpose,
        "slice": _slice,
        "narrow": _narrow,
        "select": _select,
        "chunk": _split,
        "split": _split,
        "split_with_sizes": _split,
        "unbind": _split,
        "getitem": _part,
        "cat": _cat,
        "concat": _cat,
        "concatenate": _cat,
        "dropout": _dropout,
        "feature_dropout": _dropout,
        "to": _cast,
        "_to_copy": _cast,
    }
)
