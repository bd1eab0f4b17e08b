"""Which checkpoint of a run that failed is still worth something."""

from __future__ import annotations

from pathlib import Path

from mecdeploy.training.retention import CheckpointFolder
from mecdeploy.training.state import State


def newest_good(folder: CheckpointFolder, state: State, limit: float) -> Path | None:
    """The newest checkpoint of a network that trained when it was saved; None without one.

    limit: of the mean task loss of the epoch that it ends, or is in.
    """
    for position in reversed(folder.positions()):
        epoch = position.epoch + (position.step > 0)  # the one it is in, or that it ends
        losses = [
            record["terms"].get("task", 0.0)
            for record in state.history
            if (record["stage"], record["epoch"]) == (position.stage, epoch)
        ]
        if position.step and not losses:
            losses = [state.tally.mean(state.tally.terms.get("task", 0.0))]
        if all(loss <= limit for loss in losses):
            return folder.path(position)
    return None
