"""The runs of a study as processes of their own: several at once, resumed where they stopped, none left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mecdeploy.config import changes, to_toml
from mecdeploy.errors import UserError
from mecdeploy.run_folder import CONFIG, RunFolder, is_locked, write_atomically
from mecdeploy.study.plan import FINAL, RUNS, Cell
from mecdeploy.training.interrupt import Interrupts
from mecdeploy.training.names import may_change

SETTINGS, LOGS = "settings", "logs"
CHILD = ("-m", "mecdeploy.study.child")
_SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True, kw_only=True)
class RunEvent:
    """Something happened to a run.

    what: "started", "resumed", "finished", "failed" (message: its last line), or "waiting" for a process that still
    writes to its folder. done, total: runs. accuracy: of a finished run on the validation images, 0..1. seconds_left:
    of the whole study, None while nobody knows.
    """

    cell: Cell
    what: str
    done: int
    total: int
    message: str = ""
    accuracy: float | None = None
    seconds_left: float | None = None


Tell = Callable[[RunEvent], None]


def is_finished(out: Path, cell: Cell) -> bool:
    """Whether nothing is left to do for this run."""
    return (out / RUNS / cell.name / FINAL).is_file()


def require_unchanged(out: Path, cells: Sequence[Cell]) -> None:
    """Refuse, naming the run and the key, a study whose runs in `out` were started with other settings.

    New runs are welcome, and runs that the study no longer has do not matter.
    """
    begun = {cell.name: (out / RUNS / cell.name / CONFIG).is_file() for cell in cells}
    for cell in cells:
        folder = out / RUNS / cell.name
        if begun[cell.name]:
            for key, now, then in changes(cell.config, RunFolder(folder).read_config()):
                if not may_change(key, then, now):
                    raise UserError(
                        f"run {cell.name}: {key} is {now}, but {folder} was started with {then}. Change it back, give "
                        "the method another name, or choose another --out."
                    )
            if cell.start and not begun[cell.start]:
                raise UserError(
                    f"{folder} started from {out / RUNS / cell.start}, which is gone; bring it back, or choose another "
                    "--out."
                )


def note_path(out: Path, name: str) -> Path:
    """Where the process of a run notes its versions and machine."""
    return out / SETTINGS / f"{name}.json"


def run_all(
    out: Path,
    cells: Sequence[Cell],
    *,
    jobs: int,
    threads: int,
    devices: Sequence[str] = (),
    tell: Tell,
) -> dict[str, str]:
    """Run all that is not finished; returns run -> why it failed, and no entry for those that finished.

    jobs: processes at once, each with `threads` threads; process i sees devices[i modulo their number] alone.
    Raises KeyboardInterrupt after SIGINT or SIGTERM, when every process has saved and ended.
    """
    pool = _Pool(out, cells, jobs=jobs, threads=threads, devices=devices, tell=tell)
    with Interrupts() as interrupts, _none_left(pool.processes):
        while pool.advance():
            interrupts.check()
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    return pool.failures


def run_command(out: Path, command: Sequence[str], *, threads: int, device: str | None) -> str | None:
    """Execute a command of child.py, such as ("test", out), to its end; returns why that failed, or None.

    Raises KeyboardInterrupt as `run_all` does.
    """
    process = _spawn(out, command[0], command, threads, device)
    with Interrupts() as interrupts, _none_left(lambda: [process]):
        while process.poll() is None:
            interrupts.check()
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    return _reason(_log(out, command[0]), process.returncode) if process.returncode else None


class _Pool:
    """The processes that run, what waits, and what has come of the rest."""

    def __init__(
        self, out: Path, cells: Sequence[Cell], *, jobs: int, threads: int, devices: Sequence[str], tell: Tell
    ) -> None:
        self._out, self._tell, self._threads = out, tell, threads
        self._slots = {slot: devices[slot % len(devices)] if devices else None for slot in range(jobs)}
        self._waiting = [cell for cell in cells if not is_finished(out, cell)]
        self._total, self._done = len(cells), len(cells) - len(self._waiting)
        self._running: dict[int, tuple[Cell, subprocess.Popen[bytes]]] = {}
        self._told: set[str] = set()
        self._began, self._epochs = time.monotonic(), 0
        self.failures: dict[str, str] = {}

    def processes(self) -> list[subprocess.Popen[bytes]]:
        """Those that run."""
        return [process for _, process in self._running.values()]

    def advance(self) -> bool:
        """See who has ended, start who can start; whether there is anything left to wait for."""
        for slot, (cell, process) in list(self._running.items()):
            if process.poll() is not None:
                del self._running[slot]
                self._ended(cell, process.returncode)
        for cell in list(self._waiting):
            if cell.start in self.failures:
                self._waiting.remove(cell)
                self._failed(cell, f"its start, {cell.start}, failed")
        for slot in self._slots.keys() - self._running.keys():
            ready = next((cell for cell in self._waiting if self._is_ready(cell)), None)
            if ready is not None:
                self._waiting.remove(ready)
                self._start(slot, ready)
        return bool(self._running or self._waiting)

    def _is_ready(self, cell: Cell) -> bool:
        if cell.start and not (self._out / RUNS / cell.start / FINAL).is_file():
            return False
        if cell.start in {running.name for running, _ in self._running.values()}:
            return False  # it has written its last file, and is about to end
        if not is_locked(self._out / RUNS / cell.name):
            return True
        if cell.name not in self._told:
            self._told.add(cell.name)
            self._say(cell, "waiting", "another process still writes to its folder")
        return False

    def _start(self, slot: int, cell: Cell) -> None:
        settings = self._out / SETTINGS / f"{cell.name}.toml"
        folder = self._out / RUNS / cell.name
        resumed = (folder / CONFIG).is_file()
        for file in (settings, *([folder / CONFIG] if resumed else [])):  # where it computes and reads may have changed
            write_atomically(file, to_toml(cell.config).encode())
        command = ["train", "--out", str(folder), *(["--resume"] if resumed else ["--config", str(settings)])]
        self._running[slot] = cell, _spawn(self._out, cell.name, command, self._threads, self._slots[slot])
        self._say(cell, "resumed" if resumed else "started")

    def _ended(self, cell: Cell, code: int) -> None:
        if code == 0 and is_finished(self._out, cell):
            self._done += 1
            self._epochs += cell.epochs
            self._say(cell, "finished")
        else:
            self._failed(cell, _reason(_log(self._out, cell.name), code))

    def _failed(self, cell: Cell, reason: str) -> None:
        self.failures[cell.name] = reason
        self._say(cell, "failed", reason)

    def _say(self, cell: Cell, what: str, message: str = "") -> None:
        # By epochs: those of this session took so long, so many are left. Processes at once are in both.
        left = sum(cell.epochs for cell in self._waiting) + sum(cell.epochs for cell, _ in self._running.values())
        seconds = (time.monotonic() - self._began) / self._epochs * left if self._epochs else None
        self._tell(
            RunEvent(cell=cell, what=what, done=self._done, total=self._total, message=message, seconds_left=seconds)
        )


def _spawn(out: Path, name: str, command: Sequence[str], threads: int, device: str | None) -> subprocess.Popen[bytes]:
    """Start a command of child.py that writes to the log of this name."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",  # so that an error is the last line of the log, whatever was printed before it
    }
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    child = [sys.executable, *CHILD, str(os.getpid()), str(note_path(out, name))]
    with _log(out, name).open("wb") as log:
        # In a session of its own: Ctrl-C reaches it once, through us, and so it saves.
        return subprocess.Popen(
            [*child, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


@contextmanager
def _none_left(processes: Callable[[], Sequence[subprocess.Popen[bytes]]]) -> Iterator[None]:
    """However the block is left, no process stays: each gets SIGINT, saves and ends; a second Ctrl-C kills it."""
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGKILL):
            for process in processes():
                process.send_signal(number)
            with suppress(KeyboardInterrupt):
                for process in processes():
                    process.wait()
                break


def _log(out: Path, name: str) -> Path:
    return out / LOGS / f"{name}.log"


def _reason(log: Path, code: int) -> str:
    """Why a run failed: the last line that it wrote, which is its error."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    with suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            return re.sub(r"^Error: ", "", lines[-1])
    return f"exit code {code}"
