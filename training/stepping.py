"""One optimiser step, in as many parts and on as many processes as a run has."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mecdeploy.training.batch_moments import SynchronizedBatchNorm
from mecdeploy.training.compiling import compiled
from mecdeploy.training.data import Batch
from mecdeploy.training.device import Readback, stacked
from mecdeploy.training.diagnose import first_non_finite
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.seeding import derive_seed
from mecdeploy.training.stages import Loss
from mecdeploy.training.state import State


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a step's forward passes came to, over all parts and processes: the same numbers on each of these.

    images, correct: how many, and how many of them were predicted right. loss, terms: means over the images.
    stop, save: whether any process has asked for it.
    """

    images: int
    correct: float
    loss: float
    terms: dict[str, float]
    stop: bool
    save: bool

    @property
    def finite(self) -> bool:
        """Whether the loss and each of its terms is a number."""
        return all(math.isfinite(value) for value in (self.loss, *self.terms.values()))


class Gradients:
    """Computes the gradients of steps for one network; with several processes, the means over them.

    Making one gives every process the network of process 0; all take part.
    """

    def __init__(self, state: State) -> None:
        self._state, self._world = state, state.world
        self._parts = state.config.schedule.accumulation
        schedule = state.config.schedule
        self._synchronized = not self._world.alone and schedule.batch_norm == "synchronized"
        state.task.forward = state.task.network  # frees what an earlier stage held for the exchange
        self._replica = self._world.replicate(self._world.everywhere(self._network))
        state.task.forward = self._replica

    def _network(self) -> nn.Module:
        state, network = self._state, self._state.task.network
        if not state.config.schedule.compile or state.position.stage == "deploy":  # which is simulated exactly
            return network
        if self._synchronized:
            raise TrainingError(
                "schedule.compile is true, but with several processes a compiled network cannot synchronise its "
                "BatchNorm; set schedule.batch_norm to local, or schedule.compile to false."
            )
        return compiled(network, state.device)

    def compute(self, batch: Batch, *, fraction: float, seed: int, stop: bool, save: bool) -> Measured:
        """Set the gradients of the mean loss over everybody's share of the batch; all take part.

        fraction, seed: as in Task.loss. stop, save: what this process asks for.
        """
        state = self._state
        state.optimizer.zero_grad(set_to_none=True)
        numbers: Tensor | None = None
        terms: tuple[str, ...] = ()
        for index, part in enumerate(split_batch(batch, self._parts)):
            last = index + 1 == self._parts
            with nullcontext() if last else self._replica.unaveraged():
                loss = self._forward(part, index, fraction, seed)
                summed = stacked([loss.total, loss.correct, *loss.terms.values()])
                numbers, terms = summed if numbers is None else numbers + summed, tuple(loss.terms)
                if last:
                    asked = [torch.full_like(numbers[0], float(flag)) for flag in (stop, save)]
                    readback = Readback(torch.cat([numbers, torch.stack(asked)]), self._world.sum)
                (loss.total / self._parts).backward()  # type: ignore[no-untyped-call]
        total, correct, *values, stopping, saving = readback.values()
        count = self._parts * self._world.size
        return Measured(
            images=len(batch.labels) * self._world.size,
            correct=correct,
            loss=total / count,
            terms={name: value / count for name, value in zip(terms, values, strict=True)},
            stop=stopping > 0,
            save=saving > 0,
        )

    def forward(self, batch: Batch, *, fraction: float, seed: int) -> None:
        """The forward passes of `compute` again, for whoever watches the network: uncompiled, so that hooks run."""
        task = self._state.task
        task.forward = task.network
        try:
            for index, part in enumerate(split_batch(batch, self._parts)):
                self._forward(part, index, fraction, seed)
        finally:
            task.forward = self._replica

    def culprit(self, forward: Callable[[], object]) -> str:
        """Where `forward` first stops being finite, on the first process on which it does; all take part."""
        found = first_non_finite(self._state.task.network, forward)
        return min(self._world.objects(found), key=lambda clause: "is finite" in clause)

    def _forward(self, part: Batch, index: int, fraction: float, seed: int) -> Loss:
        seed = derive_seed(seed, "part", index) if index else seed
        rank = self._world.rank
        torch.manual_seed(derive_seed(seed, "rank", rank) if rank else seed)  # dropout differs between processes
        norms: AbstractContextManager[object] = (
            SynchronizedBatchNorm(self._world) if self._synchronized else nullcontext()
        )
        with norms:
            return self._state.task.loss(part, fraction=fraction, seed=seed)


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Equal runs of a batch's images, in order."""
    if parts == 1:
        return [batch]
    views = zip(*(view.chunk(parts) for view in batch.images), strict=True)
    return [Batch(tuple(images), labels) for images, labels in zip(views, batch.labels.chunk(parts), strict=True)]
