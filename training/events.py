"""What a training run tells its caller while it works. Imports no torch; printing is the caller's business.

Epochs and steps count from 1, as a person reads them: epoch 3 of 20, step 7 of 11. The stages of a run, in order, are
"fp32", "calibrate", "qat" and "deploy"; a run has only those its config asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ACCURACY, AGREEMENT = "accuracy", "agreement with the teacher"
"""What a share of right answers is: right by the labels, or by the full-precision network where there are none."""


@dataclass(frozen=True, kw_only=True)
class StageEvent:
    """A stage begins, or goes on after a resume.

    stages: every stage of this run, in order. epochs, steps: epochs of this stage and steps in each; 0 for "calibrate".
    epoch, step: how many of them an earlier session has already done; both 0 for a fresh stage.
    parameters: trainable numbers in this stage. device: where it runs, as torch spells it (process 0's).
    processes: how many train together. widths: those of this part of the stage, in words, where schedule.progressive
    changes them on the way; the stage is then reported once for each.
    """

    stage: str
    stages: tuple[str, ...]
    epochs: int
    steps: int
    epoch: int = 0
    step: int = 0
    parameters: int = 0
    device: str = "cpu"
    processes: int = 1
    widths: str = ""


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """One optimiser step has been taken; the run's state is consistent and can be saved here.

    loss: what was minimised. terms: its parts ("task", "distill", "mec", and those of the objective).
    learning_rate: of this step. images_per_second: images (a second view of one counts nothing) over wall time since
    the epoch, or this session's part of it, began; data loading is inside, validation and checkpoints are not.
    """

    stage: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    learning_rate: float
    images_per_second: float
    terms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EpochEvent:
    """One epoch and its validation are done.

    loss, terms, train_accuracy: means over the epoch's images, as trained (augmented, training mode).
    validation_accuracy: over the whole validation set; in "qat" and "deploy" with the deployed integer arithmetic.
    train_measure, validation_measure: what these two are, ACCURACY or AGREEMENT.
    learning_rate: of the last step. seconds: training time of the epoch over all its sessions, validation excluded.
    """

    stage: str
    epoch: int
    epochs: int
    loss: float
    train_accuracy: float
    validation_accuracy: float
    learning_rate: float
    seconds: float
    images_per_second: float
    terms: Mapping[str, float] = field(default_factory=dict)
    train_measure: str = ACCURACY
    validation_measure: str = ACCURACY


@dataclass(frozen=True, kw_only=True)
class WarningEvent:
    """Something went wrong that training survives, in one sentence for the user."""

    message: str


Event = StageEvent | StepEvent | EpochEvent | WarningEvent


class TrainingInterrupted(Exception):
    """Ctrl-C (or SIGTERM) stopped the run; `train(..., resume=True)` goes on from `path` as if nothing had happened.

    path: the newest checkpoint, or None when there is none. stage, epoch, step: what it holds as done, that is `epoch`
    whole epochs of the stage and `step` steps of the next one.
    """

    def __init__(self, path: Path | None, *, stage: str, epoch: int, step: int) -> None:
        saved = "nothing is saved" if path is None else f"saved as {path.name}"
        super().__init__(f"Interrupted after {epoch} epochs and {step} steps of stage {stage}; {saved}.")
        self.path = path
        self.stage = stage
        self.epoch = epoch
        self.step = step
