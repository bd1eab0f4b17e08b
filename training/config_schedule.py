"""The section of a run's config that says how long and how fast its stages train."""

from __future__ import annotations

from dataclasses import dataclass

from mecdeploy.training.config_values import BATCH_NORMS, BIT_WIDTHS, require_at_least, require_choice
from mecdeploy.training.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long and how fast.

    fp_epochs: full-precision epochs before QAT. epochs: QAT epochs, of which the last frozen_epochs run with BatchNorm
    frozen and the deployed arithmetic simulated. calibration_images: training images that set the first step sizes.
    step_rate: learning rate of the quantisers' step sizes, in those of the weights; 0 leaves them as calibrated.
    averaging: decay, per step, of a moving average of all parameters over the live epochs, which then takes their place
    for the frozen ones; 0 for none.
    progressive: falling widths of weights and activations that the live epochs pass through, in equal shares, before
    the final ones; empty for none.
    batch_size: images of one optimiser step, on all processes together. accumulation: parts in which they are worked
    through one after the other, for networks whose batch does not fit the memory.
    compile: whether the live stages run through torch.compile: faster steps, after a first one of a minute or so.
    batch_norm: with several processes, over the images of all of them (synchronized), or of each its own (local).
    keep_checkpoints: how many of the newest stay, beside the best and the stage ends. save_minutes: an epoch that takes
    longer is saved on its way, too.
    """

    fp_epochs: int = 30
    epochs: int = 20
    frozen_epochs: int = 3
    batch_size: int = 128
    fp_learning_rate: float = 0.1
    learning_rate: float = 0.02
    step_rate: float = 1.0
    averaging: float = 0.0
    progressive: tuple[int, ...] = ()
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    calibration_images: int = 512
    accumulation: int = 1
    compile: bool = False
    batch_norm: str = "synchronized"
    keep_checkpoints: int = 2
    save_minutes: float = 10.0

    def __post_init__(self) -> None:
        minimums = {"fp_epochs": 0, "epochs": 0, "frozen_epochs": 0, "batch_size": 2}
        for key, minimum in {**minimums, "calibration_images": 1, "keep_checkpoints": 1, "accumulation": 1}.items():
            require_at_least(f"schedule.{key}", getattr(self, key), minimum)
        require_at_least("schedule.step_rate", self.step_rate, 0.0)
        require_choice("schedule.batch_norm", self.batch_norm, BATCH_NORMS)
        if self.batch_size % self.accumulation:
            raise TrainingError(
                f"schedule.batch_size is {self.batch_size}, which schedule.accumulation ({self.accumulation}) does not "
                "divide into equal parts; choose a multiple of it."
            )
        for key in ("fp_learning_rate", "learning_rate", "save_minutes"):
            if not getattr(self, key) > 0:
                raise TrainingError(f"schedule.{key} is {getattr(self, key)}; it must be positive.")
        if not 0.0 <= self.averaging < 1.0:
            raise TrainingError(
                f"schedule.averaging is {self.averaging}; it is a decay per step, at least 0 and below 1."
            )
        if self.averaging and 0 < self.epochs == self.frozen_epochs:
            raise TrainingError(
                f"schedule.averaging is {self.averaging}, but all {self.epochs} epochs are frozen and there is nothing "
                "to average; lower schedule.frozen_epochs, or set it to 0."
            )
        object.__setattr__(self, "progressive", tuple(self.progressive))
        for bits in self.progressive:
            require_choice("schedule.progressive", bits, BIT_WIDTHS)
        if list(self.progressive) != sorted(set(self.progressive), reverse=True):
            raise TrainingError(f"schedule.progressive is {list(self.progressive)}; widths have to fall, as in [8, 4].")
        live = self.epochs - self.frozen_epochs
        if self.progressive and live <= len(self.progressive):
            raise TrainingError(
                f"schedule.progressive has {len(self.progressive)} widths before the final ones, and there are {live} "
                f"live epochs (schedule.epochs less schedule.frozen_epochs); {len(self.progressive) + 1} is the least."
            )
        if self.frozen_epochs > self.epochs:
            raise TrainingError(
                f"schedule.frozen_epochs is {self.frozen_epochs}, more than schedule.epochs ({self.epochs}); lower it."
            )
