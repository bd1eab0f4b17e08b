"""`mecdeploy compare` with real runs: a study that is killed comes to what one comes to that is not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from calling import Call

from mecdeploy.run_folder import is_locked
from mecdeploy.study import compare, plots

STUDY = """
[study]
seeds = [0]
baseline = "lsq"
jobs = 2
test = true
[base]
device = "cpu"
data.validation = "carved"
schedule.epochs = 3
model.name = "net.py:make"
[start]
schedule.fp_epochs = 2
[methods.lsq]
method = "lsq"
[methods.gentle]
method = "lsq"
schedule.learning_rate = 0.005
"""
NET = """
from torch import nn


def make(channels, num_classes):
    body = (nn.Conv2d(channels, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(8, num_classes))
"""
RUNS = ["start-seed0", "lsq-w4a4-seed0", "gentle-w4a4-seed0"]
SEVERAL_SESSIONS = ("seconds", "images_per_second", "date")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.toml").write_text(STUDY)
    (folder / "net.py").write_text(NET)
    return folder


@pytest.fixture(scope="module")
def whole(place: Path, environment: dict[str, str]) -> tuple[Path, str, str]:
    """A finished study, and what it said; tests only read it."""
    found = subprocess.run(command(), cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return place / "studies" / "study", found.stdout, found.stderr


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mecdeploy", "compare", "--config", "study.toml", *arguments]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_study_leaves_records_tables_and_plots(whole: tuple[Path, str, str]) -> None:
    out, said, progress = whole
    records, tests = lines(out / "results.jsonl"), lines(out / "test.jsonl")
    assert [record["name"] for record in records] == [test["name"] for test in tests] == RUNS
    assert [record["bits"] for record in records] == ["", "W4A4", "W4A4"]
    assert [len(record["history"]) for record in records] == [2, 3, 3]
    assert records[2]["settings"] == {"method": "lsq", "schedule.learning_rate": 0.005}
    assert records[1]["start"] == RUNS[0] and records[1]["accuracy_fp32"] == records[0]["accuracy"]
    assert records[1]["environment"]["threads"] == 1 and "torch" in records[1]["environment"]["versions"]
    for record in records:
        assert record["accuracy"] == record["history"][-1]["validation_accuracy"]
    assert {test["images"] for test in tests} == {360}, "the fifth of the digits that are given for validation"
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["finished"], summary["runs"], summary["failures"]) == (3, 3, {})
    difference = 100 * (tests[2]["accuracy"] - tests[1]["accuracy"])
    row = summary["rows"][2]
    assert row["test_difference"]["mean"] == pytest.approx(difference) and row["test_difference"]["interval"] is None
    assert f"| gentle | W4A4 | 1 | {100 * records[2]['accuracy']:.2f} |" in (out / "table.md").read_text()
    assert "gentle" in said and "against lsq, points" in said
    assert "3/3" in progress and "lsq-w4a4-seed0 started" in progress and "Executing" in progress
    for name in (plots.ACCURACY, plots.CURVES):
        assert (out / name).read_text().startswith("<?xml")


def test_a_killed_study_goes_on_to_the_same_results(
    whole: tuple[Path, str, str], place: Path, environment: dict[str, str]
) -> None:
    out = place / "killed"
    study = subprocess.Popen(command("--out", "killed"), cwd=place, env=environment, stderr=subprocess.PIPE)
    runs, deadline = out / "runs", time.monotonic() + 120
    try:
        while not list(runs.glob("lsq-*/checkpoint-*.safetensors")):
            assert time.monotonic() < deadline and study.poll() is None
            time.sleep(0.005)
    finally:
        study.send_signal(signal.SIGKILL)
        study.communicate()
    while any(is_locked(run) for run in runs.iterdir()):  # nobody is left who trains on
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not (out / "test.jsonl").exists()
    found = subprocess.run(command("--out", "killed"), cwd=place, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert (out / "test.jsonl").read_bytes() == (whole[0] / "test.jsonl").read_bytes()
    assert (out / "table.md").read_bytes() == (whole[0] / "table.md").read_bytes()
    for name in (plots.ACCURACY, plots.CURVES):
        assert (out / name).read_bytes() == (whole[0] / name).read_bytes()
    for mine, other in zip(lines(out / "results.jsonl"), lines(whole[0] / "results.jsonl"), strict=True):
        differ = {key for key in mine | other if mine[key] != other[key]}
        assert differ <= set(SEVERAL_SESSIONS)


def test_test_images_are_read_once(
    whole: tuple[Path, str, str], place: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said, _ = whole
    monkeypatch.chdir(place)
    monkeypatch.setattr(compare, "run_test", lambda *arguments, **more: pytest.fail("read again"))
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    (out / "results.jsonl").unlink()
    again = call("compare", "--config", "study.toml")
    assert (again.code, again.out) == (0, said)
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before, "made again from the runs"


def test_without_matplotlib_it_says_what_to_install(
    whole: tuple[Path, str, str], place: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = call("compare", "--config", "study.toml")
    assert outcome.code == 0 and "pip install 'mecdeploy[plots]'" in outcome.err


def test_a_dry_run_lists_the_runs_and_writes_nothing(place: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    outcome = call("compare", "--config", "study.toml", "--out", "dry", "--dry-run")
    assert outcome.code == 0 and not (place / "dry").exists()
    assert "gentle-w4a4-seed0  start-seed0" in outcome.out
    assert "3 runs, 8 epochs, 10,344 images" in outcome.out, "8 epochs of 1,293 images"


def test_what_is_refused_leaves_nothing(tmp_path: Path, call: Call) -> None:
    study = tmp_path / "study.toml"
    study.write_text(STUDY.replace("schedule.learning_rate", "schedule.learning_rat"))
    out = tmp_path / "out"
    error = call("compare", "--config", study, "--out", out).error
    assert "methods.gentle: unknown key 'schedule.learning_rat'; did you mean 'schedule.learning_rate'?" in error
    assert "no such config file" in call("compare", "--config", tmp_path / "nowhere.toml", "--out", out).error
    assert not out.exists()


def test_a_failing_run_is_exit_code_1(
    whole: tuple[Path, str, str], place: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (place / "more.toml").write_text(STUDY + '[methods.lost]\nmethod = "lsq"\nweights = "nowhere.safetensors"\n')
    outcome = call("compare", "--config", "more.toml", "--out", "studies/study")
    assert outcome.code == 1
    assert "Failed: lost-w4a4-seed0: weights is nowhere.safetensors, which does not exist" in outcome.err
    assert "gentle" in outcome.out, "the others have their table"
