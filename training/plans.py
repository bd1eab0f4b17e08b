"""Plans: units to be, and what can be asked of all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from mecdeploy.training.geometry import Geometry

PIXELS = "pixels"
"""Name of the value that holds the raw input."""

LOGITS = "logits"
"""Name of the value that the model returns."""

PASS_THROUGH = ("max_pool", "reshape", "transpose", "slice", "concat", "dropout")
"""Kinds whose output keeps the quantisation of their input."""


@dataclass(kw_only=True, eq=False)
class Value:
    """A tensor between plans.

    codes: whether it is quantised; otherwise it is float. plan: who makes it; None for the pixels, and for what stays
    in float until its island is known. position: which of the plan's outputs it is. node: of what stays in float.
    """

    codes: bool
    node: fx.Node | None = None
    plan: Plan | None = None
    position: int = 0

    @property
    def depth(self) -> int:
        """Units on the longest way from the pixels."""
        return 0 if self.plan is None else self.plan.depth


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Weights of a convolution, or of a linear layer, where geometry is None. weight: [O, ...]; bias: [O] or None."""

    weight: Tensor
    bias: Tensor | None
    geometry: Geometry | None


@dataclass(kw_only=True, eq=False)
class Plan:
    """A unit to be.

    name: module path of the layer, or of the module that calls the operator plus the operator's name.
    kind: weighted, add, elementwise, global_average, average_pool, max_pool, reshape, transpose, slice, concat,
        dropout, quantize, dequantize or island. options: what the kind's unit takes besides its quantisers.
    inputs: the values it reads. layer, batch_norm: of a weighted plan.
    relu, maximum: the activation in its output quantiser; 6 after ReLU6.
    float_output: a weighted plan whose products are read as reals: logits, or what an island reads.
    """

    name: str
    kind: str
    inputs: list[Value]
    options: dict[str, Any] = field(default_factory=dict)
    layer: Layer | None = None
    batch_norm: nn.BatchNorm2d | nn.BatchNorm1d | None = None
    relu: bool = False
    maximum: float | None = None
    float_output: bool = False
    depth: int = 0
    output_count: int = 1

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the values it reads."""
        return tuple(PIXELS if value.plan is None else value.plan.value_name(value.position) for value in self.inputs)

    @property
    def asks_for_batch_size(self) -> bool:
        """Whether it is an island whose first input is the pixels, of which it reads the size alone."""
        return bool(self.options.get("asks_for_batch_size"))

    @property
    def quantized(self) -> bool:
        """Whether its output has a quantiser of its own."""
        return self.kind not in (*PASS_THROUGH, "island", "dequantize") and not self.float_output

    def value_name(self, position: int = 0) -> str:
        """Name of one of its outputs."""
        return self.name if self.output_count == 1 else f"{self.name}/{position}"


@dataclass(frozen=True, kw_only=True)
class Plans:
    """All plans by name, in execution order; output, position: whose value the model returns, and which of its."""

    by_name: Mapping[str, Plan]
    output: str
    position: int = 0

    def readers(self, name: str) -> list[Plan]:
        """The plans that read plan `name` (or PIXELS), seen through those that pass codes on unchanged."""
        found: list[Plan] = []
        for plan in self.direct_readers(name):
            found += self.readers(plan.name) if plan.kind in PASS_THROUGH else [plan]
        return found

    def direct_readers(self, name: str) -> list[Plan]:
        """The plans that read any output of plan `name` (or PIXELS; not those that ask for the number of images)."""
        if name == PIXELS:
            return [
                plan
                for plan in self.by_name.values()
                if any(value.plan is None for value in plan.inputs[int(plan.asks_for_batch_size) :])
            ]
        made = self.by_name[name]
        return [plan for plan in self.by_name.values() if any(value.plan is made for value in plan.inputs)]

    def sources(self, name: str) -> list[str]:
        """The plans (or PIXELS) whose quantisation a plan's output has: itself, or whoever it passes codes on from."""
        if name == PIXELS or self.by_name[name].kind not in PASS_THROUGH:
            return [name]
        found: list[str] = []
        for value in self.by_name[name].inputs:
            found += self.sources(PIXELS if value.plan is None else value.plan.name)
        return found

    def signed(self, name: str) -> bool:
        """Whether the values of plan `name` (or PIXELS) have both signs."""
        if name == PIXELS:
            return True
        plan = self.by_name[name]
        if plan.relu:
            return False
        if plan.kind in ("weighted", "add", "island", "quantize"):
            return bool(plan.options.get("signed", True))
        if plan.options.get("function") in ("sigmoid", "hard_sigmoid"):
            return False
        return any(self.signed(PIXELS if value.plan is None else value.plan.name) for value in plan.inputs)

    def shared(self) -> dict[str, str]:
        """Plan -> representative of the plans that share its quantisation because a concat joins their codes."""
        representative = {name: name for name, plan in self.by_name.items() if plan.quantized}

        def find(name: str) -> str:
            while representative[name] != name:
                name = representative[name]
            return name

        for plan in self.by_name.values():
            if plan.kind == "concat":
                first, *others = dict.fromkeys(self.sources(plan.name))
                for other in others:
                    representative[find(other)] = find(first)
        return {name: find(name) for name in representative}

    def last_layers(self) -> set[str]:
        """The weighted plans whose products reach the output through no other weighted plan."""
        found, todo, seen = set(), [self.by_name[self.output]], set()
        while todo:
            plan = todo.pop()
            if plan.name in seen:
                continue
            seen.add(plan.name)
            if plan.kind == "weighted":
                found.add(plan.name)
            else:
                todo += [value.plan for value in plan.inputs if value.plan is not None]
        return found

    def first_layers(self) -> set[str]:
        """The weighted plans that the pixels reach through no other; a constant's of their own are no layer."""
        found: set[str] = set()
        todo, seen = self.direct_readers(PIXELS), set()
        while todo:
            plan = todo.pop()
            if plan.name in seen:
                continue
            seen.add(plan.name)
            if plan.kind == "weighted" and not plan.options.get("affine"):
                found.add(plan.name)
            else:
                todo += self.direct_readers(plan.name)
        return found
