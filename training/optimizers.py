"""The optimiser and its learning rate, both functions of where the run stands."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mecdeploy.training.config import ScheduleConfig

WARMUP_SHARE = 0.05
LEAST_SHARE = 0.5
"""Of itself, that an update leaves of a step size."""


class GuardedSGD(torch.optim.SGD):
    """SGD with momentum whose update never carries a step size through zero.

    An update that would leave less than LEAST_SHARE of a step size leaves that share, and the momentum that overshot is
    forgotten: it would push on, halving the step again and again. Elsewhere it is SGD, bit for bit. A step size is
    guarded in the groups that are marked with step_sizes=True. There is no state in it, and nothing waits for a GPU.
    Our own: gradients of a step size overshoot, as all values of a channel or tensor pull at it together, and nothing
    in LSQ keeps it positive. docs/decisions.md shows what happens without.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update."""
        steps = [step for group in self.param_groups if group.get("step_sizes") for step in group["params"]]
        if not steps:
            return super().step(closure)
        least = torch._foreach_mul(steps, LEAST_SHARE)
        loss = super().step(closure)
        held = torch._foreach_maximum(steps, least)
        overshot = torch._foreach_sign(torch._foreach_sub(held, steps))  # 1 where it was held back, else 0
        kept = torch._foreach_add(torch._foreach_neg(overshot), 1.0)
        momenta = [self.state.get(step, {}).get("momentum_buffer") for step in steps]
        pairs = [(momentum, keep) for momentum, keep in zip(momenta, kept, strict=True) if momentum is not None]
        if pairs:  # none without momentum, nor for a step that had no gradient
            torch._foreach_mul_([momentum for momentum, _ in pairs], [keep for _, keep in pairs])
        torch._foreach_copy_(steps, held)
        return loss


def build_optimizer(
    model: nn.Module,
    schedule: ScheduleConfig,
    step_sizes: Iterable[nn.Parameter] = (),
    clipping_steps: Iterable[nn.Parameter] = (),
) -> GuardedSGD:
    """Guarded SGD with momentum in groups: weights, which decay; biases and normalisation; quantiser step sizes.

    step_sizes: the parameters of `model` that are LSQ steps; decay would pull them towards finer grids for no reason.
    They learn at schedule.step_rate times the rate of the others.
    clipping_steps: those that follow PACT instead, whose regularisation (Choi et al. 2018, arXiv:1805.06085, sec. 3) is
    decay, at the rate of the weights.
    """
    clips = {id(parameter) for parameter in clipping_steps}
    steps = {id(parameter) for parameter in step_sizes}
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "others": [], "steps": [], "clips": []}
    for parameter in model.parameters():
        if id(parameter) in steps:
            name = "clips" if id(parameter) in clips else "steps"
        else:
            name = "weights" if parameter.dim() > 1 else "others"
        groups[name].append(parameter)
    return GuardedSGD(
        [
            {
                "params": parameters,
                "weight_decay": schedule.weight_decay if name in ("weights", "clips") else 0.0,
                "step_sizes": name in ("steps", "clips"),
                "relative_rate": schedule.step_rate if name in ("steps", "clips") else 1.0,
            }
            for name, parameters in groups.items()
            if parameters
        ],
        lr=0.0,
        momentum=schedule.momentum,
    )


def warmup_steps(steps: int) -> int:
    """How many of a schedule's `steps` warm up."""
    return round(steps * WARMUP_SHARE)


def learning_rate(base: float, step: int, steps: int) -> float:
    """Rate of step `step` (from 0) of a schedule of `steps`: a linear warm-up, then half a cosine down to nearly 0.

    Source of the cosine: Loshchilov and Hutter 2017 (arXiv:1608.03983), eq. 5 without restarts.
    """
    warmup = warmup_steps(steps)
    if step < warmup:
        return base * (step + 1) / (warmup + 1)
    return base * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` in every group, times the group's own relative_rate where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("relative_rate", 1.0)


def momentum_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Momentum by parameter name of `model`; a parameter that has had no gradient yet has none."""
    found = {}
    for name, parameter in model.named_parameters():
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            found[name] = buffer
    return found


def restore_momentum(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Undo `momentum_tensors`, each buffer laid out in memory like its parameter."""
    for name, parameter in model.named_parameters():
        if name in tensors:
            buffer = torch.empty_like(parameter, requires_grad=False).copy_(tensors[name])
            optimizer.state[parameter] = {"momentum_buffer": buffer}
