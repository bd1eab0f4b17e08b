"""Progress tells epoch, loss terms, accuracy, speed and time left, on a terminal and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mecdeploy import progress
from mecdeploy.training.events import EpochEvent, Event, StageEvent, StepEvent, WarningEvent

TERMS = {"task": 1.25, "mec": 0.5}
EVENTS: list[Event] = [
    StageEvent(stage="qat", stages=("fp32", "qat"), epochs=2, steps=4, parameters=1234, device="cpu"),
    StepEvent(
        stage="qat",
        epoch=1,
        epochs=2,
        step=3,
        steps=4,
        loss=0.75,
        learning_rate=0.1,
        images_per_second=5678,
        terms=TERMS,
    ),
    EpochEvent(
        stage="qat",
        epoch=1,
        epochs=2,
        loss=0.75,
        train_accuracy=0.5,
        validation_accuracy=0.625,
        learning_rate=0.1,
        seconds=1.0,
        images_per_second=5678,
        terms=TERMS,
    ),
    WarningEvent(message="a [disk] is full"),
    StageEvent(stage="calibrate", stages=("fp32", "calibrate"), epochs=0, steps=0),
    StepEvent(
        stage="qat",
        epoch=2,
        epochs=2,
        step=1,
        steps=4,
        loss=0.5,
        learning_rate=0.1,
        images_per_second=5678,
        terms=TERMS,
    ),
]


def shown(terminal: bool, events: list[Event]) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=100, color_system=None)
    with progress.training_progress(console) as report:
        for event in events:
            report(event)
    return output.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_both_forms_tell_the_same(terminal: bool) -> None:
    text = shown(terminal, EVENTS)
    assert "QAT: 2 epochs of 4 steps on cpu, 1,234 parameters" in text
    assert "qat 1/2  loss 0.750 (task 1.250, mec 0.500)  train 50.00%  validation 62.50%  5,678 images/s" in text
    assert "Warning: a [disk] is full" in text
    assert "calibration" in text


def test_a_log_has_no_control_characters_and_an_eta() -> None:
    text = shown(False, EVENTS)
    assert "\x1b" not in text and "\r" not in text
    assert "ETA 0:0" in next(line for line in text.splitlines() if "qat 1/2" in line)


def test_a_long_epoch_says_that_it_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "step 3/4" not in shown(False, EVENTS)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    assert "qat 1/2  step 3/4  loss 0.750 (task 1.250, mec 0.500)  5,678 images/s  ETA" in shown(False, EVENTS)


def test_a_single_term_is_not_repeated() -> None:
    stage = StageEvent(stage="fp32", stages=("fp32",), epochs=1, steps=1)
    epoch = EpochEvent(
        stage="fp32",
        epoch=1,
        epochs=1,
        loss=2.0,
        train_accuracy=0,
        validation_accuracy=0,
        learning_rate=1,
        seconds=1,
        images_per_second=1,
        terms={"task": 2.0},
    )
    assert "loss 2.000  train" in shown(False, [stage, epoch])


def test_a_resumed_stage_says_so() -> None:
    event = StageEvent(stage="qat", stages=("qat",), epochs=9, steps=5, epoch=3, step=2)
    assert "resumed after epoch 3, step 2" in shown(False, [event])


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7325, "2:02:05")])
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_a_check_shows_its_parts_on_a_terminal_only() -> None:
    for terminal in (True, False):
        output = io.StringIO()
        with progress.checking_progress(Console(file=output, force_terminal=terminal, width=100)) as report:
            report("exactness", 0, 64)
            report("exactness", 64, 64)
        assert ("exactness" in output.getvalue()) is terminal
