"""At which width every weight is stored and every value is read: the policy behind QuantConfig."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from mecdeploy.training.config import QuantConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.names import no_match
from mecdeploy.training.plans import PASS_THROUGH, Plan, Plans

SKIP, ACT = "skip", "act"


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Weight bits by weighted plan; output bits by plan and role (act: read by a layer; skip: by another kernel)."""

    weights: dict[str, int]
    outputs: dict[str, dict[str, int]]


def assign_widths(plans: Plans, config: QuantConfig) -> Widths:
    """Apply a QuantConfig to plans.

    First and last layers, and what they read: first_last_bits. What other layers read: act_bits. What other kernels
    read (an Add, a pool, a product, a BatchNorm of its own): skip_bits. Only an Add is quantised more than once (two
    integer kernels compute one sum); any other value has one quantisation, the widest that a reader asks for, and
    values that a concat joins have one together. One bit holds one sign: values of both have 2 at least. Raises
    TrainingError where an override matches no unit.
    """
    _check_patterns(plans, config)
    policy = _Policy(plans, config)
    weights = {plan.name: policy.weight_bits(plan) for plan in plans.by_name.values() if plan.kind == "weighted"}
    outputs = {plan.name: policy.output_bits(plan) for plan in plans.by_name.values() if plan.quantized}
    shared = plans.shared()
    for name, group in shared.items():
        members = [other for other, theirs in shared.items() if theirs == group]
        if len(members) > 1:
            widest = max(bits for member in members for bits in outputs[member].values())
            outputs[name] = dict.fromkeys(outputs[name], widest)
        if any(plans.signed(member) for member in members):
            outputs[name] = {role: max(2, bits) for role, bits in outputs[name].items()}
    return Widths(weights=weights, outputs=outputs)


def role_of(plans: Plans, reader: Plan) -> str:
    """Role in which a plan reads its inputs: what passes codes on reads in the role of whoever reads it, skip first."""
    if reader.kind in PASS_THROUGH:
        roles = {role_of(plans, further) for further in plans.readers(reader.name)}
        return SKIP if SKIP in roles else ACT
    return ACT if reader.kind == "weighted" and not reader.options.get("affine") else SKIP


class _Policy:
    def __init__(self, plans: Plans, config: QuantConfig) -> None:
        self.plans, self.config = plans, config
        self.first, self.last = plans.first_layers(), plans.last_layers()

    def weight_bits(self, plan: Plan) -> int:
        """A BatchNorm of its own has one weight a channel: 8 bits of them cost nothing."""
        if plan.options.get("affine"):
            return 8
        edge = plan.name in self.first or plan.name in self.last
        default = self.config.first_last_bits if edge else self.config.weight_bits
        return _override(plan.name, "weight_bits", default, self.config)

    def output_bits(self, plan: Plan) -> dict[str, int]:
        """Role -> bits at which a plan's output is read."""
        bits: dict[str, int] = {}
        for reader in self.plans.direct_readers(plan.name):
            role = role_of(self.plans, reader)
            # What passes codes on hands all its readers the same ones, wide enough for each.
            for kernel in self.plans.readers(reader.name) if reader.kind in PASS_THROUGH else [reader]:
                bits[role] = max(self._wanted_bits(plan, kernel), bits.get(role, 0))
        if not bits:
            raise TrainingError(f"{plan.name}: its output is never read; remove the layer.")
        if plan.kind != "add" or len(set(bits.values())) == 1:
            return dict.fromkeys(bits, max(bits.values()))
        return bits

    def _wanted_bits(self, plan: Plan, reader: Plan) -> int:
        if reader.kind == "dequantize":
            return self.config.first_last_bits
        if role_of(self.plans, reader) == SKIP:
            return self.config.skip_bits
        edge = reader.name in self.first or reader.name in self.last
        default = self.config.first_last_bits if edge else self.config.act_bits
        return _override(plan.name, "act_bits", default, self.config)


def _override(name: str, key: str, default: int, config: QuantConfig) -> int:
    for pattern, widths in config.overrides.items():
        if fnmatchcase(name, pattern) and key in widths:
            default = widths[key]
    return default


def _check_patterns(plans: Plans, config: QuantConfig) -> None:
    names = list(plans.by_name)
    for pattern in config.overrides:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise TrainingError(no_match("quant.overrides", pattern, names))
