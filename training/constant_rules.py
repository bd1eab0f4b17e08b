"""Rules for sums and products with constants: x * k + c for each channel.

They go into the layer right before, whose products nothing else reads; elsewhere they are a depthwise 1x1 convolution,
with its own weight and bias for each channel. Learned constants become weights, and go on learning as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from mecdeploy.training.arguments import IN_FLOAT, Arguments, Rule, constant
from mecdeploy.training.geometry import Geometry
from mecdeploy.training.plans import Layer, Plan, Value
from mecdeploy.training.tracing import shape_of

if TYPE_CHECKING:
    from mecdeploy.training.planning import Planner

EXPANSIONS = ("expand", "expand_as")
NO_CHANNELS = "its constant is not one number for each channel of [N, C, H, W]"


def affine(planner: Planner, node: fx.Node, argument: Any, factor: Any = None, offset: Any = None) -> Value | str:
    """Argument * factor + offset, of which each is a number, a tensor, or None.

    Returns the argument's own value where its layer takes the constants in, or why they stay in float.
    """
    x = planner.codes(argument)
    if x is None:
        return IN_FLOAT
    shape = shape_of(argument)
    if len(shape) not in (2, 4):
        return NO_CHANNELS
    factors, offsets = _per_channel(factor, shape), _per_channel(offset, shape)
    if (factor is not None and factors is None) or (offset is not None and offsets is None):
        return NO_CHANNELS
    if (factors is None or _is_all(factors, 1.0)) and (offsets is None or _is_all(offsets, 0.0)):
        return x
    if x.plan is not None and planner.is_read_once(argument) and _takes_in(x.plan, len(shape), factors, offsets):
        _fold(x.plan, factors, offsets)
        return x
    if len(shape) != 4:
        return NO_CHANNELS
    channels = int(shape[1])
    weight = torch.ones(channels) if factors is None else factors
    geometry = Geometry(stride=(1, 1), padding=(0, 0, 0, 0), groups=channels)
    layer = Layer(weight=weight.view(-1, 1, 1, 1), bias=offsets, geometry=geometry)
    return planner.add_plan(planner.name_of(node), "weighted", [x], layer=layer, options={"affine": True})


def is_constant(planner: Planner, argument: Any) -> bool:
    """Whether an argument is a number, or a tensor that no pixel reaches."""
    return isinstance(argument, int | float) or isinstance(constant(planner, argument), Tensor)


def _per_channel(value: Any, shape: tuple[Any, ...]) -> Tensor | None:
    """One float for each channel, [C]; None for what differs between positions or images."""
    if value is None:
        return None
    channels = int(shape[1])
    tensor = torch.as_tensor(value, dtype=torch.float32)
    if tensor.numel() == 1 and tensor.dim() <= len(shape):
        return tensor.reshape(()).expand(channels).clone()
    due = (channels, 1, 1)[: len(shape) - 1]
    return tensor.reshape(channels).clone() if tuple(tensor.shape) in (due, (1, *due)) else None


def _takes_in(plan: Plan, rank: int, factors: Tensor | None, offsets: Tensor | None) -> bool:
    if plan.kind != "weighted" or plan.layer is None or rank != (2 if plan.layer.geometry is None else 4):
        return False
    if not plan.relu:
        return True
    # Behind a ReLU a factor may change places with it, if it is positive; a bound needs one factor for all channels.
    if offsets is not None or factors is None or not bool((factors > 0).all()):
        return False
    return plan.maximum is None or _is_all(factors, float(factors[0]))


def _is_all(values: Tensor, number: float) -> bool:
    return bool((values == number).all())


def _fold(plan: Plan, factors: Tensor | None, offsets: Tensor | None) -> None:
    assert plan.layer is not None
    weight, bias, norm = plan.layer.weight, plan.layer.bias, plan.batch_norm
    factors = torch.ones(len(weight)) if factors is None else factors
    offsets = torch.zeros(len(weight)) if offsets is None else offsets
    if plan.maximum is not None:
        plan.maximum *= float(factors[0])
    if norm is not None:
        with torch.no_grad():
            norm.weight.mul_(factors)
            norm.bias.mul_(factors).add_(offsets)
        return
    scaled = weight * factors.view(-1, *[1] * (weight.dim() - 1))
    plan.layer = replace(plan.layer, weight=scaled, bias=offsets if bias is None else bias * factors + offsets)


def _add(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    return _sum(planner, node, a["self"], a["other"], float(a.get("alpha", 1)))


def _subtract(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    return _sum(planner, node, a["self"], a["other"], -float(a.get("alpha", 1)))


def _subtract_from(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    if a.get("alpha", 1) != 1:
        return "rsub with alpha has no integer kernel"
    return _sum(planner, node, a["other"], a["self"], -1.0)


def _sum(planner: Planner, node: fx.Node, first: Any, second: Any, alpha: float) -> Value | str:
    """First + alpha * second."""
    if is_constant(planner, second):
        return affine(planner, node, first, offset=alpha * torch.as_tensor(_number(planner, second)))
    if is_constant(planner, first):
        return affine(planner, node, second, factor=alpha, offset=_number(planner, first))
    left, right = planner.codes(first), planner.codes(second)
    if left is None or right is None:
        return "it adds a float value"
    if shape_of(first) != shape_of(second):
        return "it adds values of two shapes"
    if alpha != 1:
        scaled = affine(planner, node, second, factor=alpha)
        if isinstance(scaled, str):
            return scaled
        right = scaled
    return planner.add_plan(planner.name_of(node), "add", [left, right])


def _number(planner: Planner, argument: Any) -> Any:
    return argument if isinstance(argument, int | float) else constant(planner, argument)


def _multiply(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    first, second = a["self"], a["other"]
    for value, other in ((first, second), (second, first)):
        if is_constant(planner, other):
            return affine(planner, node, value, factor=_number(planner, other))
    if len(shape_of(first)) != len(shape_of(second)):
        return "it multiplies values of two ranks"
    # The kernel broadcasts by itself.
    left, right = (planner.codes(planner.seen_through(argument, EXPANSIONS)) for argument in (first, second))
    if left is None or right is None:
        return "it multiplies by a float value"
    options = {"function": "mul", "alpha": 0.0}
    return planner.add_plan(planner.name_of(node), "elementwise", [left, right], options=options)


def _divide(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    if not is_constant(planner, a["other"]) or a.get("rounding_mode"):
        return "division by a value has no integer kernel"
    return affine(planner, node, a["self"], factor=1.0 / torch.as_tensor(_number(planner, a["other"])))


def _negate(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    return affine(planner, node, a["self"], factor=-1.0)


def _expand(planner: Planner, node: fx.Node, a: Arguments) -> Value | str | None:
    """Left to a product to compute."""
    x = planner.codes(a["self"])
    if x is None:
        return IN_FLOAT
    return None if len(shape_of(node)) == len(shape_of(a["self"])) else "it adds an axis"


ARITHMETIC: Mapping[str, Rule] = MappingProxyType(
    {
        "add": _add,
        "sub": _subtract,
        "rsub": _subtract_from,
        "mul": _multiply,
        "div": _divide,
        "neg": _negate,
        "expand": _expand,
        "expand_as": _expand,
    }
)
