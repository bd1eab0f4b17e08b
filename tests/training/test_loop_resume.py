"""Stopping and going on: after any step, in any stage, for any reason, to the same bits."""

import dataclasses
import os
import random
import signal
import threading

import pytest
from tiny_run import (
    STEPS,
    assert_same_run,
    interrupt_at,
    is_stage,
    is_step,
    tiny_config,
    tiny_dataset,
    tiny_images,
)

from mecdeploy.training.config import MecConfig
from mecdeploy.training.data.memory import MemorySource
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import EpochEvent, StageEvent, StepEvent, TrainingInterrupted, WarningEvent
from mecdeploy.training.loop import train

pytestmark = pytest.mark.usefixtures("tiny_models")


def comparable(events):
    """Epoch events without what a clock puts in."""
    return [dataclasses.replace(e, seconds=0.0, images_per_second=0.0) for e in events if isinstance(e, EpochEvent)]


@pytest.mark.parametrize("views", ["one", "augmented", "teacher"])
def test_interrupted_after_every_single_step(tmp_path, views):
    config = tiny_config(mec=MecConfig(samples=16, views=views, code=("features", "activations", "weights")))
    whole = []
    train(config, tiny_dataset(), tmp_path / "whole", report=whole.append)
    out, seen = tmp_path / "run", []

    def one_step(event):
        seen.append(event)
        if isinstance(event, StepEvent):
            raise KeyboardInterrupt

    for session in range(6 * STEPS):
        with pytest.raises(TrainingInterrupted) as stop:
            train(config, tiny_dataset(), out, resume=session > 0, report=one_step)
        last = seen[-1]
        assert (stop.value.stage, stop.value.epoch, stop.value.step) == (last.stage, last.epoch - 1, last.step)
        assert stop.value.path is not None and stop.value.path.is_file()
    train(config, tiny_dataset(), out, resume=True, report=one_step)
    assert_same_run(out, tmp_path / "whole")
    assert comparable(seen) == comparable(whole)
    assert [e for e in seen if isinstance(e, WarningEvent)] == []


@pytest.mark.parametrize("stage", ["fp32", "calibrate", "qat", "deploy"])
def test_interrupted_as_a_stage_begins(tmp_path, uninterrupted, stage):
    with pytest.raises(TrainingInterrupted):
        train(tiny_config(), tiny_dataset(), tmp_path / "run", report=interrupt_at(is_stage(stage)))
    train(tiny_config(), tiny_dataset(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("stage", ["fp32", "qat", "deploy"])
def test_interrupted_as_an_epoch_ends(tmp_path, uninterrupted, stage):
    def ends(event):
        return isinstance(event, EpochEvent) and (event.stage, event.epoch) == (stage, 1)

    with pytest.raises(TrainingInterrupted, match=f"after 1 epochs and 0 steps of stage {stage}"):
        train(tiny_config(), tiny_dataset(), tmp_path / "run", report=interrupt_at(ends))
    train(tiny_config(), tiny_dataset(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_crash_goes_on_from_the_last_epoch(tmp_path, uninterrupted):
    where = random.choice(
        [(stage, epoch, step) for stage in ("fp32", "qat", "deploy") for epoch in (1, 2) for step in (1, 2)]
    )
    crash = interrupt_at(is_step(*where), RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        train(tiny_config(), tiny_dataset(), tmp_path / "run", report=crash)
    train(tiny_config(), tiny_dataset(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_is_saved(tmp_path, uninterrupted, number):
    def report(event):
        if is_step("qat", 1, 2)(event):
            os.kill(os.getpid(), number)

    with pytest.raises(
        TrainingInterrupted, match="after 0 epochs and 2 steps of stage qat; saved as checkpoint-qat-"
    ) as stop:
        train(tiny_config(), tiny_dataset(), tmp_path / "run", report=report)
    assert stop.value.path == tmp_path / "run" / "checkpoint-qat-0000-step-000002.safetensors"
    train(tiny_config(), tiny_dataset(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_signal_during_validation_loses_no_step(tmp_path, uninterrupted):
    class Signalling(MemorySource):
        def batches(self, *args, **kwargs):
            for batch in super().batches(*args, **kwargs):
                os.kill(os.getpid(), signal.SIGINT)
                yield batch

    validation = Signalling(*tiny_images(24, seed=2), flip=False)
    with pytest.raises(TrainingInterrupted, match=f"after 0 epochs and {STEPS} steps of stage fp32"):
        train(tiny_config(), tiny_dataset(validation=validation), tmp_path / "run")
    train(tiny_config(), tiny_dataset(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_an_interrupt_within_a_step_saves_nothing_half_done(tmp_path, uninterrupted, monkeypatch):
    from mecdeploy.training import session

    calls = []

    def rate(*arguments):
        calls.append(arguments)
        if len(calls) == 2 * STEPS + 2:  # two epochs of steps, then the second step of qat
            raise KeyboardInterrupt
        return original(*arguments)

    original = session.learning_rate
    monkeypatch.setattr(session, "learning_rate", rate)
    with pytest.raises(
        TrainingInterrupted, match="after 2 epochs and 0 steps of stage fp32; saved as checkpoint-fp32-0002"
    ):
        train(tiny_config(), tiny_dataset(), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint-qat-*"))
    train(tiny_config(), tiny_dataset(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_runs_in_a_thread_where_no_signal_can_be_caught(tmp_path, uninterrupted):
    thread = threading.Thread(target=train, args=(tiny_config(), tiny_dataset(), tmp_path / "run"))
    thread.start()
    thread.join()
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_resumed_stage_says_where_it_stands(tmp_path):
    with pytest.raises(TrainingInterrupted):
        train(tiny_config(), tiny_dataset(), tmp_path / "run", report=interrupt_at(is_step("qat", 2, 1)))
    events = []
    train(tiny_config(), tiny_dataset(), tmp_path / "run", resume=True, report=events.append)
    first = events[0]
    assert isinstance(first, StageEvent)
    assert (first.stage, first.epoch, first.step) == ("qat", 1, 1)
    assert [e.step for e in events if isinstance(e, StepEvent)][:2] == [2, 3]


def test_a_finished_run_is_returned_as_it_is(tmp_path, uninterrupted):
    before = {path: path.read_bytes() for path in uninterrupted.iterdir()}
    events = []
    result = train(tiny_config(), tiny_dataset(), uninterrupted, resume=True, report=events.append)
    assert events == [] and len(result.history) == 6
    assert {path: path.read_bytes() for path in uninterrupted.iterdir()} == before


def test_nothing_saved_yet_starts_over_and_says_so(tmp_path, uninterrupted):
    events = []
    train(tiny_config(), tiny_dataset(), tmp_path / "run", resume=True, report=events.append)
    assert events[0] == WarningEvent(
        message=f"{tmp_path / 'run'} holds no checkpoint yet; training starts from the beginning."
    )
    assert_same_run(tmp_path / "run", uninterrupted)


def stopped_at(out, *where):
    with pytest.raises(TrainingInterrupted):
        train(tiny_config(), tiny_dataset(), out, report=interrupt_at(is_step(*where)))


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, uninterrupted):
    stopped_at(tmp_path / "run", "qat", 2, 2)
    newest = tmp_path / "run" / "checkpoint-qat-0001-step-000002.safetensors"
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    events = []
    train(tiny_config(), tiny_dataset(), tmp_path / "run", resume=True, report=events.append)
    assert isinstance(events[0], WarningEvent) and str(newest) in events[0].message
    assert (events[1].epoch, events[1].step) == (1, 0)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_only_damaged_checkpoints_is_an_error_that_names_one(tmp_path):
    stopped_at(tmp_path / "run", "fp32", 1, 2)
    (only,) = (tmp_path / "run").glob("checkpoint-*")
    only.write_bytes(b"")
    with pytest.raises(TrainingError, match=str(only)):
        train(tiny_config(), tiny_dataset(), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (tiny_config(seed=7), "seed is 7, but .* was trained with 0"),
        (tiny_config(epochs=9), r"schedule\.epochs is 9, but .*checkpoint-fp32-0000-step-000002\.safetensors was .* 4"),
        (tiny_config(mec=MecConfig(beta=0.5, samples=16, experts=2)), r"mec\.beta is 0\.5, but .* 0\.1"),
    ],
)
def test_another_config_is_refused_by_its_key(tmp_path, changed, message):
    stopped_at(tmp_path / "run", "fp32", 1, 2)
    with pytest.raises(TrainingError, match=message):
        train(changed, tiny_dataset(), tmp_path / "run", resume=True)


def test_where_data_and_device_are_may_change(tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    stopped_at(tmp_path / "run", "qat", 1, 2)
    config = tiny_config()
    data = dataclasses.replace(config.data, root="elsewhere", workers=0)
    moved = dataclasses.replace(config, data=data, device="auto")
    train(moved, tiny_dataset(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": MemorySource(*tiny_images(60, seed=1), flip=True)}, "train_images is 60, .* with 45"),
        ({"pixel_mean": 90.0}, "input is "),
        ({"class_names": ("a", "b", "c")}, "class_names is "),
    ],
)
def test_other_data_is_refused(tmp_path, changed, message):
    stopped_at(tmp_path / "run", "fp32", 1, 2)
    with pytest.raises(TrainingError, match=f"the data has changed: {message}"):
        train(tiny_config(), tiny_dataset(**changed), tmp_path / "run", resume=True)
