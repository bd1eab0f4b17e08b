"""`mecdeploy compare` with real runs: a study that is killed comes to what one comes to that is not."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from calling import Call

import mecdeploy
from mecdeploy.run_folder import is_locked
from mecdeploy.study import compare, plots
from mecdeploy.study.measuring import unmeasured
from mecdeploy.study.running import RunEvent
from mecdeploy.study.testing import write_test_accuracies

STUDY = """
[study]
seeds = [0]
baseline = "lsq"
jobs = 2
test = true
measures.representation = { images = 64 }
[base]
device = "cpu"
data.validation = "carved"
schedule.epochs = 3
[start]
weights = "START"
[methods.gentle]
method = "lsq"
schedule.learning_rate = 0.005
[methods.lsq]
method = "lsq"
"""
RUNS = ["gentle-w4a4-seed0", "lsq-w4a4-seed0"]
SEVERAL_SESSIONS = {"seconds", "images_per_second", "date"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    """A folder with a study of two runs, both from the finished run of all front-door tests."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.toml").write_text(STUDY.replace("START", str(run / "checkpoint-final.safetensors")))
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Path, list[RunEvent]]:
    """The finished study, and what was told of it; tests only read it."""
    events: list[RunEvent] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        report = mecdeploy.compare("study.toml", report=events.append)
    assert report.failures == {}
    return place / report.out, events


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_run_is_measured_once(whole: tuple[Path, list[RunEvent]]) -> None:
    """By what the command of that name writes; the difference is that of the two runs."""
    out, _ = whole
    records = lines(out / "measures.jsonl")
    assert [record["name"] for record in records] == RUNS
    for record in records:
        assert record["measures"] == {"representation": {"images": 64}}
        written = json.loads((out / "runs" / record["name"] / "representation.json").read_text())
        assert written["images"] == 64 and written["summary"] == record["values"]
    gentle, lsq = (record["values"]["weight_entropy"] for record in records)
    measured = json.loads((out / "summary.json").read_text())["measured"]
    assert [row["method"] for row in measured] == ["gentle", "lsq"]
    assert measured[0]["differences"]["weight_entropy"]["mean"] == gentle - lsq
    assert measured[1]["differences"] == {}
    table = (out / "measures.md").read_text().splitlines()
    assert table[0].startswith("| method | bits | entropy of activations, bits | entropy of weights, bits |")
    assert f"| {gentle:.3g} |" in table[2] and f"| {gentle - lsq:+.3g} |" in table[-1]
    assert unmeasured(out, {"representation": {"images": 64}}) == []
    assert unmeasured(out, {"representation": {"images": 65}}) == RUNS


def test_a_study_leaves_records_tables_and_plots(whole: tuple[Path, list[RunEvent]], run: Path) -> None:
    out, events = whole
    records, tests = lines(out / "results.jsonl"), lines(out / "test.jsonl")
    assert [record["name"] for record in records] == [test["name"] for test in tests] == RUNS
    for record in records:
        assert (record["bits"], record["epochs"], len(record["history"])) == ("W4A4", 3, 3)
        assert record["accuracy"] == record["history"][-1]["validation_accuracy"]
        assert record["environment"]["threads"] == 1 and "torch" in record["environment"]["versions"]
    assert records[0]["settings"] == {"method": "lsq", "schedule.learning_rate": 0.005}
    assert {test["images"] for test in tests} == {360}, "the fifth of the digits that is given for validation"
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["finished"], summary["runs"], summary["failures"]) == (2, 2, {})
    row = summary["rows"][0]
    difference = 100 * (tests[0]["accuracy"] - tests[1]["accuracy"])
    assert row["test_difference"]["mean"] == pytest.approx(difference) and row["test_difference"]["interval"] is None
    assert f"| gentle | W4A4 | 1 | {100 * records[0]['accuracy']:.2f} |" in (out / "table.md").read_text()
    assert sorted((event.cell.name, event.what, event.accuracy) for event in events if event.accuracy is not None) == [
        (record["name"], "finished", record["accuracy"]) for record in records
    ]
    for name in (plots.ACCURACY, plots.CURVES):
        assert (out / name).read_text().startswith("<?xml")


def test_a_killed_study_goes_on_to_the_same_results(
    whole: tuple[Path, list[RunEvent]], place: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, out = whole[0], place / "killed"
    alone = (place / "study.toml").read_text().split("[methods.lsq]")[0].replace('baseline = "lsq"', "")
    (place / "alone.toml").write_text(alone)
    command = [sys.executable, "-m", "mecdeploy", "compare", "--config", "alone.toml", "--out", "killed"]
    study = subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.DEVNULL)
    folder, deadline = out / "runs" / RUNS[0], time.monotonic() + 120
    try:
        while not list(folder.glob("checkpoint-*.safetensors")):
            assert time.monotonic() < deadline and study.poll() is None
            time.sleep(0.005)
    finally:
        study.kill()
        study.wait()
    while is_locked(folder):  # nobody is left who trains on
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not (out / "test.jsonl").exists()
    shutil.copytree(other / "runs" / RUNS[1], out / "runs" / RUNS[1])  # the other run, which this is not about
    shutil.copy(other / "settings" / f"{RUNS[1]}.json", out / "settings")
    monkeypatch.chdir(place)
    # In this process, which has loaded torch.
    monkeypatch.setattr(compare, "run_command", lambda out, command, **how: write_test_accuracies(out))
    report = mecdeploy.compare("study.toml", "killed")
    assert report.failures == {}
    for name in ("test.jsonl", "table.md", plots.ACCURACY, plots.CURVES):
        assert (out / name).read_bytes() == (other / name).read_bytes()
    for mine, theirs in zip(lines(out / "results.jsonl"), lines(other / "results.jsonl"), strict=True):
        assert {key for key in mine | theirs if mine[key] != theirs[key]} <= SEVERAL_SESSIONS


def test_a_finished_study_is_told_again_from_its_runs(
    whole: tuple[Path, list[RunEvent]], place: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = whole
    monkeypatch.chdir(place)
    monkeypatch.setattr(compare, "run_command", lambda *arguments, **how: pytest.fail("read again"))
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    (out / "results.jsonl").unlink()
    outcome = call("compare", "--config", "study.toml")
    assert outcome.code == 0 and "gentle" in outcome.out and "against lsq, points" in outcome.out
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_runs_that_come_after_the_test_are_not_tested(
    whole: tuple[Path, list[RunEvent]], place: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place / "later"
    shutil.copytree(whole[0], out)
    shutil.copytree(out / "runs" / RUNS[1], out / "runs" / "twin-w4a4-seed0")
    (place / "more.toml").write_text((place / "study.toml").read_text() + '[methods.twin]\nmethod = "lsq"\n')
    monkeypatch.chdir(place)
    outcome = call("compare", "--config", "more.toml", "--out", "later")
    assert outcome.code == 0
    assert "Not tested, since the test images were read before they ran: twin-w4a4-seed0." in outcome.err
    assert (out / "test.jsonl").read_bytes() == (whole[0] / "test.jsonl").read_bytes()


def test_without_matplotlib_it_says_what_to_install(
    whole: tuple[Path, list[RunEvent]], place: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = call("compare", "--config", "study.toml")
    assert outcome.code == 0 and "pip install 'mecdeploy[plots]'" in outcome.err


def test_a_failing_run_is_exit_code_1(
    whole: tuple[Path, list[RunEvent]], place: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(compare, "run_all", lambda *arguments, **how: {RUNS[0]: "no room left"})
    outcome = call("compare", "--config", "study.toml")
    assert outcome.code == 1 and f"Failed: {RUNS[0]}: no room left" in outcome.err
    assert "gentle" in outcome.out, "the others have their table"
    assert json.loads((whole[0] / "summary.json").read_text())["failures"] == {RUNS[0]: "no room left"}


def test_ctrl_c_says_how_to_go_on(place: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **how: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(place)
    monkeypatch.setattr(compare, "run_all", interrupted)
    outcome = call("compare", "--config", "study.toml", "--out", "stopped")
    assert outcome.code == 130
    assert "Continue with: mecdeploy compare --config study.toml --out stopped" in outcome.err


def test_data_without_test_images_are_refused_before_anything_runs(
    place: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mecdeploy.training import data

    whole_data = data.load_dataset
    monkeypatch.setattr(
        data, "load_dataset", lambda config, **how: dataclasses.replace(whole_data(config, **how), test=None)
    )
    monkeypatch.chdir(place)
    assert "digits has no test part" in call("compare", "--config", "study.toml", "--out", "untestable").error
    assert not (place / "untestable").exists()


def test_a_dry_run_lists_the_runs_and_writes_nothing(place: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    outcome = call("compare", "--config", "study.toml", "--out", "dry", "--dry-run")
    assert outcome.code == 0 and not (place / "dry").exists()
    assert "gentle-w4a4-seed0" in outcome.out
    assert "2 runs, 6 epochs, 7,758 images" in outcome.out, "6 epochs of 1,293 images"


def test_what_is_refused_leaves_nothing(tmp_path: Path, call: Call) -> None:
    study = tmp_path / "study.toml"
    study.write_text(STUDY.replace("schedule.learning_rate", "schedule.learning_rat"))
    out = tmp_path / "out"
    error = call("compare", "--config", study, "--out", out).error
    assert "methods.gentle: unknown key 'schedule.learning_rat'; did you mean 'schedule.learning_rate'?" in error
    assert "no such config file" in call("compare", "--config", tmp_path / "nowhere.toml", "--out", out).error
    assert not out.exists()
