"""The run folder: one writer at a time, no silent overwrite, every file whole or absent."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mecdeploy.config import read_config, to_toml
from mecdeploy.errors import UserError
from mecdeploy.training.config import TrainConfig

CONFIG = "run.toml"
METRICS = "metrics.jsonl"
MODEL = "model.onnx"
PARITY = "parity.json"

ALL = sys.maxsize
"""As a number of epochs to keep: every one."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name beside `path`, flush it to the disk, rename: readers see the old file or the new one.

    Raises OSError, naming `path`, where the folder is missing, read-only or full; nothing is left behind then.
    """
    if path.exists() and not path.is_file():
        kind = errno.EISDIR if path.is_dir() else errno.EINVAL  # a device would be replaced by a file of its name
        raise OSError(kind, os.strerror(kind), str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_json(path: Path, content: Any) -> None:
    """The same of a JSON document, for programs and for people."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """The same of one JSON object a line."""
    write_atomically(path, _json_lines(records))


def _json_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


class Metrics:
    """metrics.jsonl: one JSON object per finished epoch, appended as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line and flush it to the disk. Raises OSError where it has no room, leaving no part of a line."""
        size = self._path.stat().st_size if self._path.is_file() else 0
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(self._path, size)
            raise

    def read(self) -> list[dict[str, Any]]:
        """Every whole record; a line that a crash cut short is skipped."""
        records = []
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []:
            with suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def trim(self, keep: Mapping[str, int]) -> None:
        """On resume, drop the epochs that will be trained again: keep[stage] epochs stay, of other stages none."""
        self.replace(record for record in self.read() if record["epoch"] <= keep.get(record["stage"], 0))

    def replace(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Hold these records, in a file written anew unless it holds them already."""
        content = _json_lines(records)
        if not self._path.is_file() or self._path.read_bytes() != content:
            write_atomically(self._path, content)


class RunFolder:
    """A folder that one training run owns while it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = Metrics(path / METRICS)

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoint files in it."""
        return sorted(self.path.glob("checkpoint-*.safetensors"))

    def read_config(self) -> TrainConfig:
        """The config the run was started with."""
        return read_config(self.path / CONFIG)


def require_run(path: Path) -> RunFolder:
    """The folder of an existing run. Raises UserError if there is none."""
    if not (path / CONFIG).is_file():
        what = "has no run.toml, so it is no run folder" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give the folder that `mecdeploy train --out` wrote.")
    return RunFolder(path)


def require_absent(path: Path) -> None:
    """Refuse a folder that holds anything, and a path that is a file."""
    if path.is_dir():
        if set(path.iterdir()) - set(_leftovers(path)):
            hint = "add --resume to continue it, or choose another --out" if (path / CONFIG).is_file() else ""
            raise UserError(f"{path} is not empty; {hint or 'choose another --out'}.")
    elif path.exists():
        raise UserError(f"{path} is a file; choose another --out.")


@contextmanager
def create(path: Path, config: TrainConfig) -> Iterator[RunFolder]:
    """A new run's folder, with run.toml. If the run fails before its first checkpoint, the folder is gone again."""
    require_absent(path)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    folder = RunFolder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with locked(path):
            require_absent(path)
            _remove_leftovers(path)
            write_atomically(path / CONFIG, to_toml(config).encode())
            try:
                yield folder
            finally:
                if not folder.checkpoints:
                    (path / CONFIG).unlink(missing_ok=True)
                    (path / METRICS).unlink(missing_ok=True)
    finally:
        for empty in made:
            with suppress(OSError):  # not empty: the run left something worth keeping
                empty.rmdir()


@contextmanager
def reopen(path: Path) -> Iterator[RunFolder]:
    """An existing run's folder, to resume it. Raises UserError where there is none or another process writes to it."""
    folder = require_run(path)
    with locked(path):
        _remove_leftovers(path)
        yield folder


def _leftovers(path: Path) -> list[Path]:
    """What a killed process left of a file of ours that it was writing; nobody else writes these."""
    return [found for name in (CONFIG, METRICS) for found in path.glob(f".{name}.*.tmp")]


def _remove_leftovers(path: Path) -> None:
    for found in _leftovers(path):
        with suppress(OSError):
            found.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock the folder itself. The kernel drops the lock with the process, so a crash leaves no stale one.

    Raises UserError where another process holds it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path} is being written by another mecdeploy process; wait for it to end.") from None
        except OSError:
            pass  # a file system without locks: one writer is then the user's care
        yield
    finally:
        os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether a process is writing to this folder; not so where there is none."""
    try:
        with locked(path):
            return False
    except UserError:
        return True
    except OSError:
        return False


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
