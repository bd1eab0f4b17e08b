"""How a run looks while it works: bars on a terminal, plain lines anywhere else.

Both tell the same: stage, epoch, loss with its terms, accuracy, images a second, time left in the stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mecdeploy.training.events import ACCURACY, EpochEvent, Event, StageEvent, StepEvent, WarningEvent

SECONDS_BETWEEN_LINES = 30.0
"""Without a terminal, a long epoch says this often that it is alive."""

STAGE_NAMES = {
    "fp32": "full precision",
    "calibrate": "calibration",
    "qat": "QAT",
    "deploy": "QAT, deployed arithmetic",
}

Report = Callable[[Event], None]
CheckProgress = Callable[[str, int, int], None]


@contextmanager
def training_progress(console: Console) -> Iterator[Report]:
    """A callback for the events of a run, that shows them on the console."""
    if not console.is_terminal:
        yield _Lines(console).report
        return
    bars = _Bars(console)
    with Live(bars, console=console, transient=True, refresh_per_second=8):
        yield bars.report


@contextmanager
def checking_progress(console: Console) -> Iterator[CheckProgress]:
    """A callback (what, done, total) for a check, that shows a bar for each `what`; silent without a terminal."""
    if not console.is_terminal:
        yield lambda what, done, total: None
        return
    tasks: dict[str, TaskID] = {}
    with _bars(console) as progress:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield report


class _Clock:
    """Time left in a stage, from the steps that this session has done."""

    def __init__(self, event: StageEvent) -> None:
        self._first = event.epoch * event.steps + event.step
        self._total = event.epochs * event.steps
        self._began = time.monotonic()

    def seconds_left(self, done: int) -> float | None:
        """None until a step is done."""
        mine = done - self._first
        return (time.monotonic() - self._began) / mine * (self._total - done) if mine > 0 else None


class _Lines:
    """One line an epoch; within a long epoch, one every SECONDS_BETWEEN_LINES."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._clock: _Clock | None = None
        self._steps = 0
        self._last = time.monotonic()

    def report(self, event: Event) -> None:
        if isinstance(event, StageEvent):
            self._clock, self._steps = _Clock(event), event.steps
            self._say(_stage_line(event))
        elif isinstance(event, StepEvent) and time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            done = (event.epoch - 1) * event.steps + event.step
            self._say(f"{_step_line(event)}  {self._left(done)}")
        elif isinstance(event, EpochEvent):
            self._say(f"{_epoch_line(event)}  {self._left(event.epoch * self._steps)}")
        elif isinstance(event, WarningEvent):
            self._say(f"Warning: {event.message}")

    def _left(self, done: int) -> str:
        seconds = self._clock.seconds_left(done) if self._clock else None
        return f"ETA {duration(seconds)}" if seconds is not None else ""

    def _say(self, line: str) -> None:
        self._console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)
        self._last = time.monotonic()


class _Bars:
    """A bar for the stage with a line of figures below, and every finished epoch as a line above them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = _bars(console, TextColumn("{task.fields[epoch]}"))
        self._task: TaskID | None = None
        self._accuracy = ""
        self._figures = "Loading torch and the images"

    def __rich__(self) -> Group:
        return Group(self._progress, Text(self._figures, no_wrap=True, overflow="ellipsis"))

    def report(self, event: Event) -> None:
        if isinstance(event, StageEvent):
            self._begin(event)
        elif isinstance(event, StepEvent) and self._task is not None:
            done = (event.epoch - 1) * event.steps + event.step
            self._progress.update(self._task, completed=done, epoch=f"epoch {event.epoch}/{event.epochs}")
            rate = f"{event.images_per_second:,.0f} images/s"
            self._figures = f"{self._accuracy}{rate}  {_loss(event.loss, event.terms)}"
        elif isinstance(event, EpochEvent):
            self._accuracy = f"{event.validation_measure} {event.validation_accuracy:.2%}  "
            self._say(_epoch_line(event))
        elif isinstance(event, WarningEvent):
            self._say(f"Warning: {event.message}")

    def _begin(self, event: StageEvent) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._say(_stage_line(event))
        self._task = self._progress.add_task(
            STAGE_NAMES.get(event.stage, event.stage),
            total=event.epochs * event.steps or None,
            completed=event.epoch * event.steps + event.step,
            epoch="",
        )
        self._figures = ""

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _bars(console: Console, *further: ProgressColumn) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, *further, console=console, transient=True)


def _stage_line(event: StageEvent) -> str:
    name = STAGE_NAMES.get(event.stage, event.stage)
    if not event.steps:
        return name
    resumed = f", resumed after epoch {event.epoch}, step {event.step}" if event.epoch or event.step else ""
    if event.widths:
        name += f" at {event.widths} from epoch {event.epoch + 1} on"
        resumed = f", resumed after step {event.step}" if event.step else ""
    parameters = f", {event.parameters:,} parameters" if event.parameters else ""
    where = event.device if event.processes == 1 else f"{event.processes} processes, {event.device}"
    return f"{name}: {event.epochs} epochs of {event.steps} steps on {where}{parameters}{resumed}"


def _step_line(event: StepEvent) -> str:
    return (
        f"  {event.stage} {event.epoch}/{event.epochs}  step {event.step}/{event.steps}  "
        f"{_loss(event.loss, event.terms)}  {event.images_per_second:,.0f} images/s"
    )


def _epoch_line(event: EpochEvent) -> str:
    return (
        f"  {event.stage} {event.epoch}/{event.epochs}  {_loss(event.loss, event.terms)}  "
        f"train {_share(event.train_accuracy, event.train_measure)}  "
        f"validation {_share(event.validation_accuracy, event.validation_measure)}  "
        f"{event.images_per_second:,.0f} images/s"
    )


def _share(share: float, measure: str) -> str:
    """A share of right answers, saying what it is unless it is an accuracy."""
    return f"{share:.2%}" if measure == ACCURACY else f"{share:.2%} ({measure})"


def _loss(loss: float, terms: Mapping[str, float]) -> str:
    """The loss, and its terms where it has more than one."""
    parts = ", ".join(f"{name} {value:.3f}" for name, value in terms.items())
    return f"loss {loss:.3f} ({parts})" if len(terms) > 1 else f"loss {loss:.3f}"


def duration(seconds: float) -> str:
    """4:05, or 1:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
