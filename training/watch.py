"""What a stage is watched for while it trains: a loss that says it does not, and the size that went astray first."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mecdeploy.training.diagnose import parameter_names
from mecdeploy.training.model import QuantizedModel

WINDOW = 100
"""Steps whose mean loss decides."""
FIRST = 10
"""Steps that stand for the beginning of a stage."""
FEWEST_CLASSES = 10
"""Below, a single confident mistake weighs too much: its loss has no bound, that of guessing falls with the classes."""
FAR = 16.0
"""A size went astray when it is this many times what it was, or that part of it."""
LOOK_EVERY = 10
"""Steps between looks at the sizes."""


def watched_loss(terms: Mapping[str, float], temperature: float) -> float:
    """What a stage is watched by: its task loss, or without labels the divergence from the teacher at a temperature.

    terms: of the loss, by name. 0 where neither is minimised: then nothing says what guessing would cost. A guess is at
    most ln(classes) from any teacher, at any temperature.
    """
    return terms["task"] if "task" in terms else terms.get("distill", 0.0) / temperature**2


class LossWatch:
    """Tells a stage that is certain not to train from one that has not begun to.

    It does not train if the mean task loss of WINDOW steps, none of them of the warm-up, is above twice that of
    guessing (the cross entropy of equal probabilities, ln(classes), whatever the label smoothing), and above that of
    the FIRST steps. The one says that it is worse than knowing nothing, and confidently so; the other keeps a network
    that begins badly (calibrated at 2 bits, with foreign weights) and gets better. A resumed session begins afresh. The
    rule is our own.
    """

    def __init__(self, classes: int, labelled: bool = True) -> None:
        self._name = "task loss" if labelled else "divergence from the teacher"
        self.limit = 2.0 * math.log(max(classes, FEWEST_CLASSES))
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=WINDOW)

    def add(self, loss: float, *, warming_up: bool) -> None:
        """Count the task loss of one step."""
        if len(self._first) < FIRST:
            self._first.append(loss)
        if not warming_up:
            self._last.append(loss)

    def complaint(self) -> str | None:
        """A clause that gives the numbers if the stage is certain not to train, else None."""
        if len(self._last) < WINDOW:
            return None
        mean, first = sum(self._last) / WINDOW, sum(self._first) / len(self._first)
        if not mean > max(self.limit, first):
            return None
        return (
            f"the mean {self._name} of the last {WINDOW} steps is {mean:.3g}, at the beginning it was {first:.3g}; "
            f"{self.limit:.3g} is twice that of guessing"
        )


class SizeWatch:
    """Notes which size of a network is the first to be FAR times what it was when the watch began, or a FAR-th of it.

    Sizes are every step size, of each channel, and the norm of each weight of 2 or more dimensions. Whatever is noted
    stays on the network's device until `first` asks for it, so that no step waits for a GPU.
    """

    @torch.no_grad()
    def __init__(self, network: nn.Module) -> None:
        steps = network.step_sizes() if isinstance(network, QuantizedModel) else []
        self._steps: list[nn.Parameter] = steps
        self._weights: list[Tensor] = [parameter for parameter in network.parameters() if parameter.dim() > 1]
        names = parameter_names(network)
        self._names = [(names[id(p)], channel) for p in steps for channel in range(p.numel())]
        self._names += [(names[id(p)], 0) for p in self._weights]
        self._channels = {names[id(p)]: p.numel() for p in steps}
        self._calls = 0
        self._looks: list[tuple[int, int]] = []
        if self._names:
            self._start = self._sizes()
            self._index = torch.full((), -1, dtype=torch.int64, device=self._start.device)
            self._when = torch.zeros_like(self._index)
            self._ratio = torch.ones_like(self._start[0])

    def look(self, epoch: int, step: int) -> None:
        """After this step, both from 1; every LOOK_EVERY calls it looks."""
        self._calls += 1
        if self._calls % LOOK_EVERY == 0:
            self._look(epoch, step)

    def first(self, epoch: int, step: int) -> str | None:
        """A clause that names it, or None where none has gone by this step, the last. Waits for the device."""
        self._look(epoch, step)
        if not self._names or int(self._index) < 0:
            return None
        name, channel = self._names[int(self._index)]
        epoch, step = self._looks[int(self._when)]
        where = f" (channel {channel})" if self._channels.get(name, 1) > 1 else ""
        return f"{name}{where} went first, {float(self._ratio):.2g} times its start at epoch {epoch}, step {step}"

    @torch.no_grad()
    def _look(self, epoch: int, step: int) -> None:
        if not self._names:
            return
        ratios = torch.where(self._start > 0, self._sizes() / self._start, 1.0)  # what begins at 0 has no ratio
        departures = ratios.clamp_min(0.0).log2().abs().nan_to_num(nan=math.inf)
        furthest, index = departures.max(0)
        new = (self._index < 0) & (furthest > math.log2(FAR))
        self._index = torch.where(new, index, self._index)
        self._ratio = torch.where(new, ratios[index], self._ratio)
        self._when = torch.where(new, len(self._looks), self._when)
        self._looks.append((epoch, step))

    def _sizes(self) -> Tensor:
        weights = torch._foreach_norm(self._weights) if self._weights else ()
        return torch.cat([*(step.detach().flatten() for step in self._steps), *(norm.view(1) for norm in weights)])
