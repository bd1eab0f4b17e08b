"""`mecdeploy compare` with real runs: a study that is killed comes to what its runs come to that are not.

Of its processes, those that train are real; what a study's other processes execute runs in this one, which has torch.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from calling import Call

import mecdeploy
from mecdeploy.config import read_config
from mecdeploy.run_folder import is_locked
from mecdeploy.study import child, compare, plots
from mecdeploy.study.measuring import unmeasured
from mecdeploy.study.running import RunEvent

STUDY = """
[study]
seeds = [0]
baseline = "lsq"
OUTCOME[base]
device = "cpu"
data.validation = "carved"
data.fraction = 0.25
schedule.epochs = 3
[start]
weights = "START"
[methods.gentle]
method = "lsq"
schedule.learning_rate = 0.005
[methods.lsq]
method = "lsq"
"""
OUTCOME = "test = true\nmeasures.representation = { images = 64 }\n"
RUNS = ["gentle-w4a4-seed0", "lsq-w4a4-seed0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    """A folder with a study of two runs, both from the finished run of all front-door tests."""
    folder = tmp_path_factory.mktemp("study")
    study = STUDY.replace("START", str(run / "checkpoint-final.safetensors"))
    (folder / "study.toml").write_text(study.replace("OUTCOME", OUTCOME))
    (folder / "runs-alone.toml").write_text(study.replace("OUTCOME", ""))
    return folder


@pytest.fixture(scope="module")
def whole(place: Path, environment: dict[str, str]) -> tuple[Path, list[RunEvent]]:
    """The study, killed while its first run trains, then finished; and what was told of the latter. Tests read it."""
    out, events = place / "studies" / "study", list[RunEvent]()
    kill_in_the_first_run(place, out, environment)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(compare, "run_command", execute_here)
        report = mecdeploy.compare("study.toml", report=events.append)
    assert report.failures == {} and place / report.out == out
    return out, events


def kill_in_the_first_run(place: Path, out: Path, environment: dict[str, str]) -> None:
    """Start the study, and kill it (not its run, which nobody tells) once there is something to resume from."""
    command = [sys.executable, "-m", "mecdeploy", "compare", "--config", "runs-alone.toml", "--out", str(out)]
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


def execute_here(out: Path, command: Sequence[str], **how: object) -> None:
    """As the study's child would, in this process."""
    name, *arguments = command
    (found,) = (known for known in child.commands() if known.name == name)
    found.main(arguments, standalone_mode=False)


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


def test_a_killed_study_comes_to_what_its_runs_come_to(whole: tuple[Path, list[RunEvent]], tmp_path: Path) -> None:
    """To the same bits as one call of `train` in this process, which nobody interrupts."""
    import torch

    from mecdeploy.training.checkpoint import read_checkpoint

    out, events = whole
    assert [(event.cell.name, event.what) for event in events if event.what != "finished"] == [
        (RUNS[0], "resumed"),
        (RUNS[1], "started"),
    ]
    killed = out / "runs" / RUNS[0]
    mecdeploy.train(read_config(killed / "run.toml"), tmp_path / "run")
    mine, theirs = (read_checkpoint(run / "checkpoint-final.safetensors") for run in (killed, tmp_path / "run"))
    assert mine.tensors.keys() == theirs.tensors.keys() and mine.header["accuracy"] == theirs.header["accuracy"]
    assert all(torch.equal(mine.tensors[key], theirs.tensors[key]) for key in mine.tensors)
    found = lines(out / "results.jsonl")[0]["history"]
    for epoch, expected in zip(found, theirs.header["history"], strict=True):
        assert epoch == {key: expected[key] for key in epoch}


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
    monkeypatch.setattr(compare, "run_command", execute_here)
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
    assert "2 runs, 6 epochs, 1,950 images" in outcome.out, "6 epochs of 325 images"


def test_what_is_refused_leaves_nothing(tmp_path: Path, call: Call) -> None:
    study = tmp_path / "study.toml"
    study.write_text(STUDY.replace("OUTCOME", "").replace("schedule.learning_rate", "schedule.learning_rat"))
    out = tmp_path / "out"
    error = call("compare", "--config", study, "--out", out).error
    assert "methods.gentle: unknown key 'schedule.learning_rat'; did you mean 'schedule.learning_rate'?" in error
    assert "no such config file" in call("compare", "--config", tmp_path / "nowhere.toml", "--out", out).error
    assert not out.exists()
