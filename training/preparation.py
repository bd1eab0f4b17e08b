"""prepare: a quantised copy of a float classifier, in three steps: plan the units, assign widths, build."""

from __future__ import annotations

import copy

from torch import fx, nn

from mecdeploy.training.config import QuantConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.model import LOGITS, QuantizedModel, Step
from mecdeploy.training.patterns import PIXELS, Plan, Plans, plan_units
from mecdeploy.training.quantizers import ActivationQuantizer
from mecdeploy.training.units import (
    AddUnit,
    DropoutUnit,
    FlattenUnit,
    Geometry,
    GlobalAveragePoolUnit,
    MaxPoolUnit,
    Unit,
    WeightedUnit,
    pair,
)
from mecdeploy.training.widths import Widths, assign_widths, role_of


def prepare(model: nn.Module, config: QuantConfig, spec: InputSpec) -> QuantizedModel:
    """Quantised copy of a float classifier; calibrate() it next.

    model: takes normalised float32 [N, C, H, W] (what spec.normalize gives), returns logits [N, classes]; not changed.
    Raises TrainingError naming the operator that has no unit, or the override that matches none.
    """
    plans = plan_units(_trace(copy.deepcopy(model)))
    for name in (PIXELS, LOGITS):
        if name in plans.by_name and name != plans.output:
            raise TrainingError(f"{name}: the model's own {name} have this name; rename the layer.")
    widths = assign_widths(plans, config)
    units = {plan.name: _build(plan, plans, widths) for plan in plans.by_name.values()}
    program = [
        Step(plan.name, tuple(_value_read(plan, source, plans, widths) for source in plan.reads))
        for plan in plans.by_name.values()
    ]
    return QuantizedModel(program, units, spec, config)


def _trace(model: nn.Module) -> fx.GraphModule:
    try:
        return fx.symbolic_trace(model)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise TrainingError(
            f"{type(model).__name__} cannot be traced: {reason}. Its forward must not branch on values of tensors."
        ) from error


def _build(plan: Plan, plans: Plans, widths: Widths) -> Unit:
    names = output_names(plan, plans, widths)
    bits = list(dict.fromkeys(widths.outputs.get(plan.name, {}).values()))
    outputs = [ActivationQuantizer(width, signed=plans.signed(plan.name), maximum=plan.maximum) for width in bits]
    if plan.kind == "weighted":
        assert isinstance(plan.layer, nn.Conv2d | nn.Linear)
        output = outputs[0] if outputs else None
        return WeightedUnit(plan.layer, plan.batch_norm, widths.weights[plan.name], output, names)
    if plan.kind == "add":
        return AddUnit(outputs, names)
    if plan.kind == "average_pool":
        return GlobalAveragePoolUnit(outputs, names)
    if plan.kind == "max_pool":
        return _max_pool(plan.layer, names)
    if plan.kind == "flatten":
        return FlattenUnit([], names)
    assert plan.kind == "dropout" and isinstance(plan.layer, nn.Dropout)
    return DropoutUnit(plan.layer.p, names)


def output_names(plan: Plan, plans: Plans, widths: Widths) -> tuple[str, ...]:
    """Names of a plan's values: its own, or NAME/skip and NAME/act where one sum is quantised twice."""
    if plan.name == plans.output:
        return (LOGITS,)
    roles = widths.outputs.get(plan.name, {})
    if len(set(roles.values())) < 2:
        return (plan.name,)
    return tuple(f"{plan.name}/{role}" for role in roles)


def _value_read(reader: Plan, source: str, plans: Plans, widths: Widths) -> str:
    if source == PIXELS:
        return PIXELS
    names = output_names(plans.by_name[source], plans, widths)
    return names[0] if len(names) == 1 else f"{source}/{role_of(plans, reader)}"


def _max_pool(layer: nn.Module | None, names: tuple[str, ...]) -> MaxPoolUnit:
    assert isinstance(layer, nn.MaxPool2d)
    kernel = pair(layer.kernel_size)
    geometry = Geometry(stride=pair(layer.stride or kernel), padding=pair(layer.padding), dilation=pair(layer.dilation))
    return MaxPoolUnit(kernel, geometry, layer.ceil_mode, names)
