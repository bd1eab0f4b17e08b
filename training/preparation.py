"""prepare: a quantised copy of a float classifier, in four steps: trace, plan the units, assign widths, build."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from mecdeploy.training.config import QuantConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.geometry import Geometry, sides
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.methods import RULES, Rules
from mecdeploy.training.model import QuantizedModel, Step
from mecdeploy.training.movement import (
    ConcatUnit,
    DequantizeUnit,
    DropoutUnit,
    FloatUnit,
    MaxPoolUnit,
    QuantizeUnit,
    ReshapeUnit,
    SliceUnit,
    TransposeUnit,
)
from mecdeploy.training.normalization import fold_normalization
from mecdeploy.training.planning import plan_units
from mecdeploy.training.plans import LOGITS, PIXELS, Plan, Plans
from mecdeploy.training.quantizers import ActivationQuantizer
from mecdeploy.training.tracing import trace
from mecdeploy.training.units import (
    AddUnit,
    AveragePoolUnit,
    ElementwiseUnit,
    GlobalAveragePoolUnit,
    Unit,
    WeightedUnit,
)
from mecdeploy.training.weight_grids import choose_weight_quantizer
from mecdeploy.training.widths import Widths, assign_widths, role_of


def prepare(model: nn.Module, config: QuantConfig, spec: InputSpec, method: str = "lsq") -> QuantizedModel:
    """Quantised copy of a float classifier; calibrate() it next.

    model: any module that torch.export can trace: takes normalised float32 [N, C, H, W] (what spec.normalize gives),
    returns logits [N, classes], alone or first in a tuple or dict. It is not changed.
    method: whose rules the quantisers follow: lsq (mec has the same), lsq+, pact or dorefa (docs/baselines.md).
    Raises TrainingError for code that cannot be traced, a layer without an integer kernel that quant.float_layers does
    not list, a pattern that matches nothing, a normalisation that cannot be folded, and an unknown method.
    """
    if method not in RULES:
        raise TrainingError(f"method is {method!r}, which has no quantisers; choose one of {', '.join(RULES)}.")
    rules = RULES[method]
    plans = plan_units(trace(model, spec), config.float_layers)
    for name in (PIXELS, LOGITS):
        if name in plans.by_name and name != plans.output:
            raise TrainingError(f"{name}: the model's own {name} have this name; rename the layer.")
    fold_normalization(plans, spec)
    widths = assign_widths(plans, config)
    quantizers = _quantizers(plans, widths, config, rules)
    units = {
        plan.name: BUILDERS[plan.kind](
            plan, quantizers.get(plan.name, []), output_names(plan, plans, widths), widths.weights.get(plan.name, 0)
        )
        for plan in plans.by_name.values()
    }
    for unit in units.values():  # builders know widths, not methods
        if isinstance(unit, WeightedUnit):
            bits = unit.weight_quantizer.bits
            unit.weight_quantizer = choose_weight_quantizer(unit.weight, bits, config.weight_grid, rules.weights)
    program = [Step(plan.name, _values_read(plan, plans, widths)) for plan in plans.by_name.values()]
    return QuantizedModel(program, units, spec, config)


def output_names(plan: Plan, plans: Plans, widths: Widths) -> tuple[str, ...]:
    """Names of a plan's values: its own, NAME/skip and NAME/act where one sum is quantised twice, or LOGITS."""
    roles = widths.outputs.get(plan.name, {})
    if len(set(roles.values())) > 1:
        names = tuple(f"{plan.name}/{role}" for role in roles)
    else:
        names = tuple(plan.value_name(position) for position in range(plan.output_count))
    if plan.name == plans.output:
        names = (*names[: plans.position], LOGITS, *names[plans.position + 1 :])
    return names


def _values_read(reader: Plan, plans: Plans, widths: Widths) -> tuple[str, ...]:
    names = []
    for value in reader.inputs:
        if value.plan is None:
            names.append(PIXELS)
            continue
        made = output_names(value.plan, plans, widths)
        split = len(set(widths.outputs.get(value.plan.name, {}).values())) > 1
        names.append(f"{value.plan.name}/{role_of(plans, reader)}" if split else made[value.position])
    return tuple(names)


def _quantizers(
    plans: Plans, widths: Widths, config: QuantConfig, rules: Rules
) -> dict[str, list[ActivationQuantizer]]:
    """Output quantisers by plan: one for each width at which it is read, sharing what a concat joins."""
    groups = plans.shared()
    members: dict[str, list[str]] = {}
    for name, group in groups.items():
        members.setdefault(group, []).append(name)
    made: dict[str, list[ActivationQuantizer]] = {}
    for names in members.values():
        signed = any(plans.signed(name) for name in names)
        bounds = {plans.by_name[name].maximum for name in names}
        for name in names:
            made[name] = [
                ActivationQuantizer(
                    bits,
                    signed=signed,
                    rectified=signed and plans.by_name[name].relu,
                    # Values of one scale have one bound, or none.
                    maximum=plans.by_name[name].maximum if len(bounds) == 1 else None,
                    learn_zero_point=config.zero_point == "learned" or rules.learned_zero_points,
                    pact=rules.activations == "pact",
                )
                for bits in dict.fromkeys(widths.outputs[name].values())
            ]
            if name != names[0]:
                made[name][0].share(made[names[0]][0])
    return made


Outputs = list[ActivationQuantizer]
Names = tuple[str, ...]
Builder = Callable[[Plan, Outputs, Names, int], Unit]


def _weighted(plan: Plan, outputs: Outputs, names: Names, weight_bits: int) -> Unit:
    assert plan.layer is not None
    return WeightedUnit(plan.layer, plan.batch_norm, weight_bits, outputs[0] if outputs else None, names)


def _average_pool(plan: Plan, outputs: Outputs, names: Names, _: int) -> Unit:
    o = plan.options
    geometry = Geometry(stride=o["stride"], padding=sides(o["padding"]))
    return AveragePoolUnit(o["kernel"], geometry, o["count_include_pad"], outputs, names)


def _elementwise(plan: Plan, outputs: Outputs, names: Names, _: int) -> Unit:
    return ElementwiseUnit(plan.options["function"], plan.options["alpha"], outputs, names)


BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        "weighted": _weighted,
        "add": lambda plan, outputs, names, _: AddUnit(outputs, names),
        "elementwise": _elementwise,
        "global_average": lambda plan, outputs, names, _: GlobalAveragePoolUnit(outputs, names),
        "average_pool": _average_pool,
        "quantize": lambda plan, outputs, names, _: QuantizeUnit(outputs, names),
        "dequantize": lambda plan, outputs, names, _: DequantizeUnit(outputs, names),
        "max_pool": lambda plan, outputs, names, _: MaxPoolUnit(**plan.options, output_names=names),
        "reshape": lambda plan, outputs, names, _: ReshapeUnit(**plan.options, output_names=names),
        "transpose": lambda plan, outputs, names, _: TransposeUnit(**plan.options, output_names=names),
        "slice": lambda plan, outputs, names, _: SliceUnit(**plan.options, output_names=names),
        "concat": lambda plan, outputs, names, _: ConcatUnit(**plan.options, output_names=names),
        "dropout": lambda plan, outputs, names, _: DropoutUnit(**plan.options, output_names=names),
        "island": lambda plan, outputs, names, _: FloatUnit(**plan.options, output_names=names),
    }
)
"""Plan kind -> unit."""
