"""Which checkpoints of a run stay: the newest, the best, and the one at the end of each stage."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from mecdeploy.training.checkpoint import FINAL, Checkpoint, Position, read_checkpoint, read_header, write_checkpoint
from mecdeploy.training.errors import TrainingError


class CheckpointFolder:
    """The checkpoints of one run, by position. A file that is not named like one of ours is never touched.

    keep: how many of the newest stay, at least 1.
    """

    def __init__(self, folder: Path, *, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep
        self._merits: dict[Position, tuple[bool, float | None]] = {}

    def require_new(self) -> None:
        """Raise TrainingError if the folder already holds checkpoints of a run."""
        if self.positions() or (self.folder / FINAL).exists():
            raise TrainingError(f"{self.folder} already holds a run; resume it, or choose another folder.")

    def make_writable(self) -> None:
        """Create the folder, and remove what a killed process left half-written.

        Raises TrainingError if no file can be written there.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".checkpoint-*.tmp"):
                leftover.unlink()
            with tempfile.TemporaryFile(dir=self.folder) as probe:
                probe.write(b"\0")
        except OSError as error:
            raise TrainingError(
                f"{self.folder} cannot be written ({error.strerror or error}); choose another."
            ) from error

    def positions(self) -> list[Position]:
        """Positions on disk, the furthest last."""
        found = (Position.from_file_name(path.name) for path in self.folder.glob("checkpoint-*.safetensors"))
        return sorted(position for position in found if position is not None)

    def newest(self) -> Position | None:
        """The furthest position on disk."""
        positions = self.positions()
        return positions[-1] if positions else None

    def path(self, position: Position) -> Path:
        """Where the checkpoint of a position lies."""
        return self.folder / position.file_name

    def save(self, position: Position, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
        """Write one and drop what need not stay. header: "stage_end" and "accuracy" decide how long this one stays.

        OSError and TrainingError as in write_checkpoint; then every older file is still there.
        """
        path = self.path(position)
        write_checkpoint(path, tensors, header)
        self._merits[position] = _merits(header)
        self._prune()
        return path

    def load_newest(self) -> tuple[Position | None, Checkpoint | None, list[str]]:
        """The furthest checkpoint that can be read, or None when there is none; and a sentence for each damaged one.

        Raises TrainingError when there are checkpoints and none can be read.
        """
        complaints: list[str] = []
        for position in reversed(self.positions()):
            try:
                return position, read_checkpoint(self.path(position)), complaints
            except TrainingError as error:
                complaints.append(str(error))
        if complaints:
            raise TrainingError(complaints[0])
        return None, None, []

    def _prune(self) -> None:
        positions = self.positions()
        keep = set(positions[-self.keep :])
        scored: list[tuple[float, Position]] = []
        quantized = positions[-1].stage != "fp32"
        for position in positions:
            stage_end, accuracy = self._known_merits(position)
            if stage_end:
                keep.add(position)
            if accuracy is not None and (position.stage != "fp32") == quantized:
                scored.append((accuracy, position))
        if scored:
            keep.add(max(scored)[1])
        for position in positions:
            if position not in keep:
                with suppress(OSError):  # what cannot be removed costs room, and is tried again
                    self.path(position).unlink()

    def _known_merits(self, position: Position) -> tuple[bool, float | None]:
        if position not in self._merits:
            try:
                self._merits[position] = _merits(read_header(self.path(position)))
            except TrainingError:
                self._merits[position] = (False, None)
        return self._merits[position]


def _merits(header: Mapping[str, Any]) -> tuple[bool, float | None]:
    return bool(header.get("stage_end")), header.get("accuracy")
