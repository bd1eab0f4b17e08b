"""TensorBoard's event files of a run: the epochs of metrics.jsonl, counted over all stages."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mecdeploy.errors import UserError
from mecdeploy.training.config import ScheduleConfig
from mecdeploy.training.events import EpochEvent, Event, WarningEvent

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
"""In the run folder."""


def wanted(run: Path, asked: bool, resume: bool) -> bool:
    """Whether to write event files: where they are asked for, or where a run that is resumed has some.

    Raises UserError where the package that writes them is missing.
    """
    if not (asked or (resume and (run / FOLDER).is_dir())):
        return False
    if importlib.util.find_spec("tensorboard") is None:
        instead = "leave out --tensorboard" if asked else f"remove {run / FOLDER}"
        raise UserError(
            f"TensorBoard's event files need a package that is not installed: pip install 'mecdeploy[tensorboard]', or "
            f"{instead}."
        )
    return True


class EventFiles:
    """Writes to RUN/tensorboard/. Nothing is there before the first epoch is done."""

    def __init__(self, run: Path, schedule: ScheduleConfig) -> None:
        self._folder = run / FOLDER
        live = schedule.epochs - schedule.frozen_epochs
        self._before = {"fp32": 0, "qat": schedule.fp_epochs, "deploy": schedule.fp_epochs + live}
        self._writer: SummaryWriter | None = None

    def record(self, event: Event, tell: Callable[[Event], None]) -> None:
        """An epoch is a step of every curve. A full disk costs steps, not the run: `tell` gets a warning."""
        if isinstance(event, EpochEvent):
            try:
                self._write(event)
            except OSError as error:
                self.close()  # a writer that failed once fails for ever; the next epoch tries a new one
                reason = error.strerror or error
                tell(WarningEvent(message=f"{FOLDER}/ could not be written ({reason}); training goes on without it."))

    def _write(self, event: EpochEvent) -> None:
        step = self._before[event.stage] + event.epoch
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # What an earlier session wrote from this epoch on is trained again, and taken back by whoever reads.
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        curves = {
            "loss": event.loss,
            f"train/{event.train_measure}": event.train_accuracy,
            f"validation/{event.validation_measure}": event.validation_accuracy,
            "learning_rate": event.learning_rate,
            "images_per_second": event.images_per_second,
            **{f"terms/{name}": value for name, value in event.terms.items()},
        }
        for name, value in curves.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Release the file."""
        if self._writer is not None:
            with suppress(OSError):  # a full disk has been told
                self._writer.close()
            self._writer = None
