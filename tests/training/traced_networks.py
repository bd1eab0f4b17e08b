"""Networks given as functions, traced and planned: what the tests of planning share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.planning import plan_units
from mecdeploy.training.plans import Plan, Plans
from mecdeploy.training.tracing import trace

SPEC = InputSpec.from_statistics(channels=3, height=8, width=8, mean=120.7, std=64.1)

Row = tuple[str, str, tuple[str, ...]]
"""Name, kind and reads of a plan."""


class Classifier(nn.Module):
    """Layers by name, and a forward given as a function of the module and the image."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.body = forward

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def conv(*, inputs: int = 4, bias: bool = False) -> nn.Conv2d:
    """3x3, to 4 channels, of the same size."""
    return nn.Conv2d(inputs, 4, 3, padding=1, bias=bias)


def classifier(forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> Classifier:
    """One with `conv`, the image to 4 channels of 8x8, and `fc`, 4 features to 5 logits."""
    return Classifier(forward, **{"conv": conv(inputs=3), "fc": nn.Linear(4, 5), **layers})


def plans_of(forward: Callable[[Any, Tensor], Any], float_layers: Sequence[str] = (), **layers: nn.Module) -> Plans:
    """Plans of `classifier`."""
    return plan_units(trace(classifier(forward, **layers), SPEC), float_layers)


def row(plan: Plan) -> Row:
    """What a table shows of a plan."""
    return (plan.name, plan.kind, plan.reads)


def table(plans: Plans) -> list[Row]:
    """All plans in execution order."""
    return [row(plan) for plan in plans.by_name.values()]


def pooled(module: Any, x: Tensor) -> Tensor:
    """The end of most networks here: [N, 4, H, W] to [N, 5]."""
    logits: Tensor = module.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
    return logits


TAIL = [("adaptive_avg_pool2d", "global_average"), ("flatten", "reshape"), ("fc", "weighted")]


def with_tail(*rows: Row) -> list[Row]:
    """Rows, and those of `pooled` behind the last."""
    result, last = list(rows), rows[-1][0]
    for name, kind in TAIL:
        result.append((name, kind, (last,)))
        last = name
    return result


CONV: Row = ("conv", "weighted", ("pixels",))
