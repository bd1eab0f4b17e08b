"""What the stages of a run are, and what each minimises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training.coded_layers import coded_layers
from mecdeploy.training.config import DistillConfig, MecConfig, TrainConfig
from mecdeploy.training.data import Batch
from mecdeploy.training.device import channels_last
from mecdeploy.training.distillation import Taught, Teacher, distillation_loss
from mecdeploy.training.gathering import gather_recordings
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.mec import mec_objective
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.oscillation import damping_loss, damping_weight, low_bit_layers
from mecdeploy.training.recording import Recording
from mecdeploy.training.world import ALONE, World


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training under one schedule.

    first_step, schedule_steps: where the stage begins in its learning rate schedule, and how long that is; "qat" and
    "deploy" share one. base_rate: the schedule's peak.
    """

    name: str
    epochs: int
    steps: int
    base_rate: float
    first_step: int
    schedule_steps: int


def plan_stages(config: TrainConfig, steps: int) -> tuple[Stage, ...]:
    """The training stages of a run, in order, those of 0 epochs included; steps: optimiser steps in an epoch."""
    schedule = config.schedule
    full = Stage(
        name="fp32",
        epochs=schedule.fp_epochs,
        steps=steps,
        base_rate=schedule.fp_learning_rate,
        first_step=0,
        schedule_steps=schedule.fp_epochs * steps,
    )
    if config.method == "fp32":
        return (full,)
    live = schedule.epochs - schedule.frozen_epochs

    def quantized(name: str, epochs: int, first_epoch: int) -> Stage:
        return Stage(
            name=name,
            epochs=epochs,
            steps=steps,
            base_rate=schedule.learning_rate,
            first_step=first_epoch * steps,
            schedule_steps=schedule.epochs * steps,
        )

    return full, quantized("qat", live, 0), quantized("deploy", schedule.frozen_epochs, live)


@dataclass(frozen=True)
class Loss:
    """One step's loss.

    total: () to be minimised, attached to the graph. correct: () right predictions, averaged over views.
    terms: () parts of the loss for the record, by name.
    """

    total: Tensor
    correct: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


class Task(Protocol):
    """A network and its loss.

    forward: the network as `loss` calls it; with several processes, such that they average its gradients.
    """

    forward: Callable[..., Any]

    @property
    def network(self) -> nn.Module:
        """What is trained."""
        ...

    @property
    def views(self) -> int:
        """Augmentations of each image that a batch has to hold."""
        ...

    def loss(self, batch: Batch, *, fraction: float, seed: int) -> Loss:
        """Loss of a batch; fraction: share of the quantised schedule already done; seed: of this step alone."""
        ...

    def logits(self, pixels: Tensor) -> Tensor:
        """uint8 [m, C, H, W] to [m, classes]."""
        ...


class FloatTask:
    """Cross entropy of the full-precision network on normalised pixels."""

    views = 1

    def __init__(self, network: nn.Module, spec: InputSpec, *, label_smoothing: float, device: torch.device) -> None:
        self.network, self.spec, self.device = network, spec, device
        self.forward: Callable[..., Any] = network
        self.label_smoothing = label_smoothing

    def loss(self, batch: Batch, *, fraction: float, seed: int) -> Loss:
        """Cross entropy of one view."""
        logits = self.forward(self._normalized(batch.images[0]))
        task = F.cross_entropy(logits, batch.labels.to(self.device), label_smoothing=self.label_smoothing)
        return Loss(task, _correct(logits, batch.labels.to(self.device)), {"task": task})

    def logits(self, pixels: Tensor) -> Tensor:
        """uint8 [m, C, H, W] to [m, classes]."""
        scores: Tensor = self.network(self._normalized(pixels))
        return scores

    def _normalized(self, pixels: Tensor) -> Tensor:
        return self.spec.normalize(channels_last(pixels, self.device))


class QuantizedTask:
    """Cross entropy of the quantised network and distillation, minus the coding objective where `mec` is given.

    teacher: the full-precision network, where any of these needs it: distill.weight, mec.views "teacher" (with its
    features), images without labels. labelled: whether labels are looked at. world: whose rows are coded together where
    mec.gather says so.
    """

    def __init__(
        self,
        network: QuantizedModel,
        *,
        label_smoothing: float,
        device: torch.device,
        mec: MecConfig | None = None,
        distill: DistillConfig | None = None,
        teacher: Teacher | None = None,
        labelled: bool = True,
        world: World = ALONE,
    ) -> None:
        self.network, self.device, self.world = network, device, world
        self.distill, self.labelled = distill or DistillConfig(), labelled
        self.forward: Callable[..., Any] = network
        self.label_smoothing, self.mec, self.teacher = label_smoothing, mec, teacher
        self.coded = () if mec is None else coded_layers(network, mec)
        self.damped = low_bit_layers(network) if network.config.damping else {}
        self.views = 2 if mec is not None and mec.views == "augmented" else 1

    def loss(self, batch: Batch, *, fraction: float, seed: int) -> Loss:
        """That of what the network computes, and of where its weights lie."""
        loss = self._computed(batch, fraction=fraction, seed=seed)
        if not self.damped:
            return loss
        damping = damping_weight(self.network.config.damping, fraction) * damping_loss(self.damped)
        return Loss(loss.total + damping, loss.correct, {**loss.terms, "damping": damping})

    def _computed(self, batch: Batch, *, fraction: float, seed: int) -> Loss:
        """Task loss over every view, and the objective of the first against the second or the teacher's.

        Without labels, `correct` counts the images of the teacher's class.
        """
        pixels = channels_last(torch.cat(batch.images), self.device)
        if self.mec is None:
            logits, recording = self.forward(pixels), None
        else:
            logits, recording = self.forward(pixels, self.mec.code, self.coded)
        taught = None if self.teacher is None else self.teacher(pixels)
        if self.labelled or taught is None:
            labels = batch.labels.to(self.device).repeat(self.views)
        else:
            labels = taught.logits.argmax(1)
        total, terms = self._task_loss(logits, labels, taught)
        correct = _correct(logits, labels) / self.views
        if self.mec is None or recording is None:
            return Loss(total, correct, terms)
        generator = torch.Generator(device=self.device).manual_seed(seed)
        first, other = gather_recordings(*self._codings(recording, taught), self.mec, generator, self.world)
        objective = mec_objective(first, self.mec, other=other, step_fraction=fraction, generator=generator)
        terms |= {
            "mec": objective.total,
            **{name: torch.as_tensor(t) for name, t in objective.terms.items()},
        }
        return Loss(total - objective.total, correct, terms)

    def logits(self, pixels: Tensor) -> Tensor:
        """uint8 [m, C, H, W] to [m, classes]."""
        scores: Tensor = self.network(channels_last(pixels, self.device))
        return scores

    def _task_loss(self, logits: Tensor, labels: Tensor, taught: Taught | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy and distillation, weighted, and each by itself; 0 where nothing but the objective is left."""
        terms, weight = dict[str, Tensor](), self.distill.weight
        if self.labelled:
            terms["task"] = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if taught is not None and weight > 0:
            terms["distill"] = distillation_loss(logits, taught.logits, self.distill.temperature)
        if len(terms) == 2:
            return (1.0 - weight) * terms["task"] + weight * terms["distill"], terms
        return next(iter(terms.values()), logits.new_zeros(())), terms

    def _codings(self, recording: Recording, taught: Taught | None) -> tuple[Recording, Recording | None]:
        if self.views == 2:
            return split_views(recording)
        if taught is None or taught.features is None:
            return recording, None
        return recording, Recording(features=taught.features)


def split_views(recording: Recording) -> tuple[Recording, Recording]:
    """The recording of two views that went through together, [2m, ...], as two of [m, ...]; weights are shared."""
    halves = {name: value.chunk(2) for name, value in recording.activations.items()}
    features = (None, None) if recording.features is None else recording.features.chunk(2)
    first, second = (
        Recording(
            features=features[view],
            activations={name: pair[view] for name, pair in halves.items()},
            weights=dict(recording.weights),
        )
        for view in (0, 1)
    )
    return first, second


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == labels).sum()
