"""Rules for pools."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import fx

from mecdeploy.training.arguments import IN_FLOAT, Arguments, Rule
from mecdeploy.training.arrangement_rules import repeated
from mecdeploy.training.geometry import Geometry, pair, sides
from mecdeploy.training.movement_rules import reshape_to, tiled_maximum
from mecdeploy.training.plans import Value
from mecdeploy.training.tracing import shape_of

if TYPE_CHECKING:
    from mecdeploy.training.planning import Planner


def _max_pool2d(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a["self"])
    if x is None:
        return IN_FLOAT
    kernel = pair(a["kernel_size"])
    geometry = Geometry(
        stride=pair(a["stride"]) if a["stride"] else kernel, padding=sides(a["padding"]), dilation=pair(a["dilation"])
    )
    options = {"kernel": kernel, "geometry": geometry, "ceil_mode": bool(a["ceil_mode"])}
    return planner.add_plan(planner.name_of(node), "max_pool", [x], options=options)


def _adaptive_max_pool2d(planner: Planner, node: fx.Node, a: Arguments) -> Value | str | None:
    """The values are taken out by a getitem, and their indices by nobody."""
    if planner.codes(a["self"]) is None:
        return IN_FLOAT
    size, wanted = shape_of(a["self"])[-2:], pair(a["output_size"])
    if size[0] % wanted[0] or size[1] % wanted[1]:
        return f"maximum pooling of {tuple(size)} positions to {wanted} has windows of several sizes"
    return None


def _largest(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x, shape = planner.codes(a["self"]), shape_of(a["self"])
    if x is None:
        return IN_FLOAT
    if len(shape) != 4 or sorted(axis % 4 for axis in a["dim"]) != [2, 3]:
        return "only a maximum over height and width has an integer kernel"
    pooled = tiled_maximum(planner, node, x, (int(shape[2]), int(shape[3])))
    return pooled if a["keepdim"] else reshape_to(planner, node, pooled)


def _avg_pool2d(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a["self"])
    if x is None:
        return IN_FLOAT
    kernel, padding = pair(a["kernel_size"]), pair(a["padding"])
    stride = pair(a["stride"]) if a["stride"] else kernel
    size, made = shape_of(a["self"])[-2:], shape_of(node)[-2:]
    whole = [(size[axis] + 2 * padding[axis] - kernel[axis]) // stride[axis] + 1 for axis in (0, 1)]
    if list(made) != whole or a["divisor_override"]:
        return "average pooling over windows that overhang (ceil_mode), or with divisor_override, has no integer kernel"
    return _average(planner, node, x, kernel, stride, padding, bool(a["count_include_pad"]))


def _adaptive_avg_pool2d(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a["self"])
    if x is None:
        return IN_FLOAT
    size = tuple(int(extent) for extent in shape_of(a["self"])[-2:])
    wanted = pair(a["output_size"])
    if wanted == size:
        return x
    if not (wanted[0] % size[0] or wanted[1] % size[1]):
        # Every window is one position, which several windows share.
        return repeated(planner, node, x, size, (wanted[0] // size[0], wanted[1] // size[1]))
    if size[0] % wanted[0] or size[1] % wanted[1]:
        return f"average pooling of {size} positions to {wanted} has windows of several sizes"
    kernel = (size[0] // wanted[0], size[1] // wanted[1])
    return _average(planner, node, x, kernel, kernel, (0, 0), True)


def _mean(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a["self"])
    rank = len(shape_of(a["self"]))
    if x is None:
        return IN_FLOAT
    if rank != 4 or sorted(axis % rank for axis in a.get("dim") or []) != [2, 3]:
        return "only a mean over height and width has an integer kernel"
    pooled = planner.add_plan(planner.name_of(node), "global_average", [x])
    return pooled if a["keepdim"] else reshape_to(planner, node, pooled)


def _average(
    planner: Planner,
    node: fx.Node,
    x: Value,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    count_include_pad: bool,
) -> Value:
    if kernel == tuple(shape_of(node.args[0])[-2:]) and padding == (0, 0):  # type: ignore[arg-type]
        return planner.add_plan(planner.name_of(node), "global_average", [x])
    options = {"kernel": kernel, "stride": stride, "padding": padding, "count_include_pad": count_include_pad}
    return planner.add_plan(planner.name_of(node), "average_pool", [x], options=options)


POOLS: Mapping[str, Rule] = MappingProxyType(
    {
        "max_pool2d": _max_pool2d,
        "adaptive_max_pool2d": _adaptive_max_pool2d,
        "amax": _largest,
        "avg_pool2d": _avg_pool2d,
        "adaptive_avg_pool2d": _adaptive_avg_pool2d,
        "mean": _mean,
    }
)
