"""At which width every weight is stored and every value is read: the policy behind QuantConfig."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mecdeploy.training.config import QuantConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.patterns import PASS_THROUGH, PIXELS, Plan, Plans

SKIP, ACT = "skip", "act"


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Weight bits by weighted plan; output bits by plan and role (skip: read by an Add or a pool; act: by a layer)."""

    weights: dict[str, int]
    outputs: dict[str, dict[str, int]]


def assign_widths(plans: Plans, config: QuantConfig) -> Widths:
    """Apply a QuantConfig to plans.

    First and last layer: first_last_bits. Whatever an Add or the global pool reads: skip_bits. What layers read:
    act_bits. Only an Add is quantised more than once (two integer kernels compute one sum); any other value has one
    quantisation, the widest that a reader asks for. Raises TrainingError where an override matches no unit.
    """
    _check_patterns(plans, config)
    weighted = [plan for plan in plans.by_name.values() if plan.kind == "weighted"]
    weights = {plan.name: _weight_bits(plans, plan, config) for plan in weighted}
    outputs = {
        plan.name: _output_bits(plans, plan, config)
        for plan in plans.by_name.values()
        if plan.kind not in PASS_THROUGH and plan.name != plans.output
    }
    return Widths(weights=weights, outputs=outputs)


def role_of(plans: Plans, reader: Plan) -> str:
    """Role in which a plan reads its inputs: what passes codes on reads in the role of whoever reads it, skip first."""
    if reader.kind in PASS_THROUGH:
        roles = {role_of(plans, further) for further in plans.readers(reader.name)}
        return SKIP if SKIP in roles else ACT
    return ACT if reader.kind == "weighted" else SKIP


def _weight_bits(plans: Plans, plan: Plan, config: QuantConfig) -> int:
    edge = plan.name == plans.output or plan in plans.readers(PIXELS)
    return _override(plan.name, "weight_bits", config.first_last_bits if edge else config.weight_bits, config)


def _output_bits(plans: Plans, plan: Plan, config: QuantConfig) -> dict[str, int]:
    bits: dict[str, int] = {}
    for reader in (other for other in plans.by_name.values() if plan.name in other.reads):
        role = role_of(plans, reader)
        # What passes codes on hands all its readers the same ones, wide enough for each.
        for kernel in plans.readers(reader.name) if reader.kind in PASS_THROUGH else [reader]:
            bits[role] = max(_wanted_bits(plans, plan, kernel, config), bits.get(role, 0))
    if not bits:
        raise TrainingError(f"{plan.name}: its output is never read; remove the layer.")
    widest = max(bits.values())
    if plan.kind != "add" or len(set(bits.values())) == 1:
        return dict.fromkeys(bits, widest)
    return bits


def _wanted_bits(plans: Plans, plan: Plan, reader: Plan, config: QuantConfig) -> int:
    if role_of(plans, reader) == SKIP:
        return config.skip_bits
    default = config.first_last_bits if reader.name == plans.output else config.act_bits
    return _override(plan.name, "act_bits", default, config)


def _override(name: str, key: str, default: int, config: QuantConfig) -> int:
    for pattern, widths in config.overrides.items():
        if fnmatchcase(name, pattern) and key in widths:
            default = widths[key]
    return default


def _check_patterns(plans: Plans, config: QuantConfig) -> None:
    names = list(plans.by_name)
    for pattern in config.overrides:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Units are: {', '.join(names[:8])}, ..."
            raise TrainingError(f"quant.overrides: {pattern!r} matches no unit.{hint}")
