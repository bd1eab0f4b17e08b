"""Which checkpoint of a run that failed is still worth something."""

from __future__ import annotations

from pathlib import Path

from mecdeploy.training.retention import CheckpointFolder
from mecdeploy.training.stages import Stage
from mecdeploy.training.state import State
from mecdeploy.training.watch import watched_loss


def newest_good(folder: CheckpointFolder, state: State, limit: float) -> Path | None:
    """The newest checkpoint of a network that trained when it was saved; None without one.

    limit: of the mean task loss of the epoch that it ends, or is in.
    """
    temperature = state.config.distill.temperature
    for position in reversed(folder.positions()):
        epoch = position.epoch + (position.step > 0)  # the one it is in, or that it ends
        losses = [
            watched_loss(record["terms"], temperature)
            for record in state.history
            if (record["stage"], record["epoch"]) == (position.stage, epoch)
        ]
        if position.step and not losses:
            losses = [state.tally.mean(watched_loss(state.tally.terms, temperature))]
        if all(loss <= limit for loss in losses):
            return folder.path(position)
    return None


def another_run(stage: Stage, good: Path | None) -> str:
    """What to do instead of training this stage further, as the end of a sentence. good: newest_good's checkpoint."""
    key, again = ("fp_learning_rate", "") if stage.name == "fp32" else ("learning_rate", ", schedule.fp_epochs = 0")
    keep = "" if good is None else f" and, to keep its full-precision weights, weights = {str(good)!r}{again}"
    return f"start another run with a lower schedule.{key} (now {stage.base_rate:g}){keep}."
