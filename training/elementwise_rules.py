"""Rules for activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor, fx

from mecdeploy.training.arguments import IN_FLOAT, Arguments, Rule, constant
from mecdeploy.training.plans import Value
from mecdeploy.training.tracing import operator_name

if TYPE_CHECKING:
    from mecdeploy.training.planning import Planner


_ABSORBS = ("weighted", "add", "average_pool", "global_average")


def _relu(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    return _rectify(planner, node, a, None)


def _relu6(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    return _rectify(planner, node, a, 6.0)


def _hardtanh(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    low, high = a.get("min_val", a.get("min")), a.get("max_val", a.get("max"))
    if low != 0 or not (high is None or (isinstance(high, int | float) and high > 0)):
        return f"{operator_name(node)} to {low}..{high} has no integer kernel; from 0 up it is a ReLU"
    return _rectify(planner, node, a, None if high is None else float(high))


def _rectify(planner: Planner, node: fx.Node, a: Arguments, maximum: float | None) -> Value | str:
    argument = a.get("self", a.get("input"))
    x = planner.codes(argument)
    if x is None:
        return IN_FLOAT
    plan = x.plan
    joins = plan is not None and (plan.kind in _ABSORBS or plan.options.get("function") == "mul")
    if plan is not None and joins and planner.is_read_once(argument):
        plan.relu = True
        plan.maximum = min((bound for bound in (plan.maximum, maximum) if bound is not None), default=None)
        return x
    # Somebody else reads the value too, or its maker hands on codes: a kernel of its own.
    return _elementwise(planner, node, "leaky_relu", [x], alpha=0.0, relu=True, maximum=maximum)


def _leaky_relu(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    return _with_slope(planner, node, a, float(a["negative_slope"]))


def _prelu(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    """One slope for all channels stays as it is; training goes on with it fixed."""
    slope = constant(planner, a["weight"])
    if not isinstance(slope, Tensor) or slope.numel() != 1:
        return "prelu with a slope for each channel has no integer kernel; one slope for all has"
    return _with_slope(planner, node, a, float(slope))


def _rrelu(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    """Deployed, the random slope is its mean."""
    return _with_slope(planner, node, a, (float(a["lower"]) + float(a["upper"])) / 2)


def _with_slope(planner: Planner, node: fx.Node, a: Arguments, slope: float) -> Value | str:
    x = planner.codes(a["self"])
    if x is None:
        return IN_FLOAT
    if not 0 <= slope < 1:
        return f"{operator_name(node)} with slope {slope} has no integer kernel; slopes from 0 up to 1 have"
    return _elementwise(planner, node, "leaky_relu", [x], alpha=slope, relu=slope == 0)


def _sigmoid(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a["self"])
    return IN_FLOAT if x is None else _elementwise(planner, node, "sigmoid", [x], maximum=1.0)


def _hard_sigmoid(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a["self"])
    return IN_FLOAT if x is None else _elementwise(planner, node, "hard_sigmoid", [x], maximum=1.0)


def _silu(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    return _gated(planner, node, a, "sigmoid")


def _hardswish(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    return _gated(planner, node, a, "hard_sigmoid")


def _gated(planner: Planner, node: fx.Node, a: Arguments, gate: str) -> Value | str:
    """X * gate(x): two kernels."""
    x = planner.codes(a["self"])
    if x is None:
        return IN_FLOAT
    name = f"{planner.name_of(node)}_gate"
    factor = planner.add_plan(name, "elementwise", [x], options={"function": gate, "alpha": 0.0}, maximum=1.0)
    return _elementwise(planner, node, "mul", [x, factor])


def _elementwise(
    planner: Planner,
    node: fx.Node,
    function: str,
    inputs: Sequence[Value],
    *,
    alpha: float = 0.0,
    relu: bool = False,
    maximum: float | None = None,
) -> Value:
    options = {"function": function, "alpha": alpha}
    return planner.add_plan(planner.name_of(node), "elementwise", inputs, options=options, relu=relu, maximum=maximum)


ELEMENTWISE_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "relu": _relu,
        "relu6": _relu6,
        "hardtanh": _hardtanh,
        "clamp": _hardtanh,
        "clamp_min": _hardtanh,
        "leaky_relu": _leaky_relu,
        "prelu": _prelu,
        "rrelu": _rrelu,
        "sigmoid": _sigmoid,
        "hardsigmoid": _hard_sigmoid,
        "silu": _silu,
        "hardswish": _hardswish,
    }
)
