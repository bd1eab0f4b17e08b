"""`train --tensorboard`, read back with TensorBoard's own reader."""

from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path

import pytest
from calling import TINY, Call, largest_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mecdeploy
from mecdeploy import QuantConfig, ScheduleConfig, TrainConfig
from mecdeploy.event_files import EventFiles
from mecdeploy.training.events import EpochEvent, Event, WarningEvent

SCHEDULE = ScheduleConfig(fp_epochs=1, epochs=3, frozen_epochs=1)
CONFIG = TrainConfig(device="cpu", quant=QuantConfig(weight_bits=4, act_bits=4), schedule=SCHEDULE)


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) as TensorBoard shows them."""
    reader = EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    return {tag: [(point.step, point.value) for point in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


class Stopped(Exception):
    """Stands for a crash."""


def stop_after(stage: str) -> object:
    """A reporter that fails once an epoch of this stage is reported, which no checkpoint holds yet or ever will."""

    def report(event: Event) -> None:
        if isinstance(event, EpochEvent) and event.stage == stage:
            raise Stopped

    return report


def test_a_crash_and_a_resume_leave_each_epoch_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        mecdeploy.train(CONFIG, run, report=stop_after("qat"), tensorboard=True)  # type: ignore[arg-type]
    before = curves(run)["loss"]
    assert [step for step, _ in before] == [1, 2]
    mecdeploy.train(CONFIG, run, resume=True)  # nobody asked again
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 4
    found = curves(run)
    for tag, key in [
        ("loss", "loss"),
        ("validation/accuracy", "validation_accuracy"),
        ("train/accuracy", "train_accuracy"),
        ("learning_rate", "learning_rate"),
    ]:
        expected = [(step, pytest.approx(record[key], rel=1e-6)) for step, record in enumerate(records, 1)]  # float32
        assert found[tag] == expected, tag
    assert [step for step, _ in found["terms/mec"]] == [2, 3, 4], "the objective begins with QAT"


@pytest.mark.filterwarnings("ignore:Exception in thread:pytest.PytestUnhandledThreadExceptionWarning")  # tensorboard's
def test_a_full_disk_costs_its_epochs_alone(tmp_path: Path) -> None:
    files, told = EventFiles(tmp_path, SCHEDULE), []

    def done(stage: str, epoch: int) -> None:
        numbers = {"loss": 1.0, "train_accuracy": 0.5, "validation_accuracy": 0.5, "learning_rate": 0.1}
        event = EpochEvent(stage=stage, epoch=epoch, epochs=2, seconds=1.0, images_per_second=9.0, **numbers)
        files.record(event, told.append)

    done("fp32", 1)
    with largest_file(100):
        done("qat", 1)
    done("qat", 2)
    files.close()
    for thread in threading.enumerate():
        if type(thread).__name__ == "_AsyncWriterThread":  # complains as it ends, which is to be in this test
            thread.join(60)
    assert [type(event) for event in told] == [WarningEvent] and "tensorboard/ could not be written" in told[0].message
    assert [step for step, _ in curves(tmp_path)["loss"]] == [1, 3]


def test_off_by_default(run: Path) -> None:
    assert not (run / "tensorboard").exists()


def test_a_missing_package_is_told_before_anything_is_written(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name))
    run = tmp_path / "run"
    error = call("train", "--tensorboard", "--out", run, *TINY).error
    assert "pip install 'mecdeploy[tensorboard]', or leave out --tensorboard." in error
    assert not run.exists()


def test_a_resumed_run_whose_reader_is_missing_names_the_folder(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "run.toml").write_text("")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name))
    assert f"or remove {tmp_path / 'tensorboard'}." in call("train", "--resume", "--out", tmp_path).error
