"""kill -9 while the front door writes: run.toml, metrics.jsonl, and between them and a checkpoint."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killed_runs import KILLED, Death, Nursery
from tiny_run import (
    DEPLOY_EPOCHS,
    FINAL,
    FP_EPOCHS,
    QAT_EPOCHS,
    assert_same_run,
    assert_same_tensors,
    tiny_config,
    tiny_dataset,
)

import mecdeploy
from mecdeploy.training.events import EpochEvent, WarningEvent

pytestmark = pytest.mark.usefixtures("tiny_models")

EPOCHS = [
    (stage, epoch)
    for stage, epochs in {"fp32": FP_EPOCHS, "qat": QAT_EPOCHS, "deploy": DEPLOY_EPOCHS}.items()
    for epoch in range(1, epochs + 1)
]


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as nursery:
        yield nursery


def epochs_in(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(record["stage"], record["epoch"]) for record in records]


DEATHS = {
    "run.toml half written": Death(function="os:fsync", number=1, matching=""),
    "run.toml written": Death(function="os:replace", number=1, when="after"),
    "metrics.jsonl begun": Death(function="os:replace", number=2, when="before"),
    "before the first line": Death(function="mecdeploy.run_folder:Metrics.append", number=1),
    "after a line, before its checkpoint": Death(
        function="mecdeploy.run_folder:Metrics.append", number=4, when="after"
    ),
    "after the last line": Death(function="mecdeploy.run_folder:Metrics.append", number=6, when="after"),
    "the final checkpoint": Death(function="os:replace", matching="final"),
    "after the final checkpoint": Death(function="os:replace", matching="final", when="after"),
}


@pytest.mark.parametrize("where", DEATHS)
def test_killed_there_the_run_and_its_metrics_come_out_whole(tmp_path, uninterrupted, nursery, where):
    out = tmp_path / "run"
    assert nursery.run(out, front_door=True, death=DEATHS[where]) == KILLED
    assert nursery.run(out, front_door=True) == 0
    assert_same_run(out, uninterrupted)
    assert epochs_in(out) == EPOCHS
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_a_line_cut_in_half_is_written_again(tmp_path, uninterrupted, nursery):
    out = tmp_path / "run"
    death = Death(function="mecdeploy.run_folder:Metrics.append", number=5)
    assert nursery.run(out, front_door=True, death=death) == KILLED
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "deploy", "epo')
    assert nursery.run(out, front_door=True) == 0
    assert_same_run(out, uninterrupted)
    assert epochs_in(out) == EPOCHS


def test_the_command_line_resumes_what_kill_minus_nine_left(tmp_path):
    """The real program on digits: killed as soon as there is a first checkpoint, against one that was left alone."""
    environment = {**os.environ, "PYTHONPATH": str(Path(mecdeploy.__file__).parents[1]), "PYTHONWARNINGS": "error"}
    arguments = ["--fp-epochs", "2", "--epochs", "1", "--device", "cpu"]

    def start(out, *further):
        command = [sys.executable, "-m", "mecdeploy", "train", "--out", str(out), *further]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    whole, process = start(tmp_path / "whole", *arguments), start(tmp_path / "run", *arguments)
    while process.poll() is None and not list((tmp_path / "run").glob("checkpoint-*")):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == KILLED
    assert start(tmp_path / "run", "--resume").wait() == 0 == whole.wait()
    assert_same_tensors(*(tmp_path / name / FINAL for name in ("whole", "run")))
    assert epochs_in(tmp_path / "run") == epochs_in(tmp_path / "whole") == [("fp32", 1), ("fp32", 2), ("deploy", 1)]


def test_a_full_disk_costs_lines_of_the_metrics_and_not_the_run(tmp_path, monkeypatch, uninterrupted):
    """The device that is always full stands in the file's place from the second epoch to the fourth."""
    monkeypatch.setattr("mecdeploy.training.data.load_dataset", lambda *_, **__: tiny_dataset())
    out, metrics, warnings, seen = tmp_path / "run", tmp_path / "run" / "metrics.jsonl", [], []

    def report(event):
        if isinstance(event, WarningEvent):
            warnings.append(event.message)
        if isinstance(event, EpochEvent):
            seen.append((event.stage, event.epoch))
            if seen[-1] == ("fp32", 1):
                metrics.unlink()
                metrics.symlink_to("/dev/full")
            if seen[-1] == ("qat", 2):
                metrics.unlink()

    mecdeploy.train(tiny_config(), out, report=report)
    goes_on = "training goes on, and writes its missing lines at the end."
    full = f"metrics.jsonl could not be written (No space left on device); {goes_on}"
    assert [message for message in warnings if "No space" in message] == [full] * 3
    assert all(message.endswith(goes_on) for message in warnings)  # where a stage begins, it is no file to write to
    assert epochs_in(out) == EPOCHS == seen
    assert_same_run(out, uninterrupted)
