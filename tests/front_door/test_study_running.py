"""The processes of a study, played by a small script: who runs when, what a failure and Ctrl-C do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mecdeploy.errors import UserError
from mecdeploy.run_folder import locked, write_atomically
from mecdeploy.study import running
from mecdeploy.study.config import read_study
from mecdeploy.study.plan import FINAL, Cell, plan
from mecdeploy.study.running import RunEvent, require_unchanged, run_all, run_command

STUDY = """
[study]
seeds = [0, 1]
[base]
schedule.epochs = 1
[start]
schedule.fp_epochs = 1
[methods.lsq]
method = "lsq"
[methods.mec]
method = "mec"
"""
ALL = ["start-seed0", "lsq-w4a4-seed0", "mec-w4a4-seed0", "lsq-w4a4-seed1", "mec-w4a4-seed1"]

# As child.py is called: PARENT NOTE train --out RUN (--resume | --config FILE). It finishes, fails or waits, by name.
CHILD = """
import os, pathlib, shutil, signal, sys, time
_, parent, note, verb, _, out, *rest = sys.argv
out = pathlib.Path(out)
out.mkdir(exist_ok=True)
if rest[0] == "--config":
    shutil.copy(rest[1], out / "run.toml")
seen = [os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES", "as it was")]
(out / "seen").write_text(" ".join(seen))
if out.name in os.environ.get("FAILING", "").split():
    print("some output")
    print("Error: no room left in", out.name, file=sys.stderr)
    sys.exit(2)
def stop(number, frame):
    with (out / "signals").open("a") as file:
        file.write(signal.Signals(number).name + " ")
    time.sleep(0.3)  # saving
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
(out / "ready").touch()
while out.name in os.environ.get("WAITING", "").split():
    time.sleep(0.02)
(out / "checkpoint-final.safetensors").touch()
"""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    monkeypatch.setattr(running, "CHILD", (str(script),))
    monkeypatch.setattr(running, "_SECONDS_BETWEEN_LOOKS", 0.01)
    folder = tmp_path / "out"
    for part in ("runs", "settings", "logs"):
        (folder / part).mkdir(parents=True)
    return folder


def cells(out: Path, text: str = STUDY) -> tuple[Cell, ...]:
    path = out.parent / "study.toml"
    path.write_text(text)
    return plan(read_study(path), out)


def run(
    out: Path, *, jobs: int = 2, devices: tuple[str, ...] = (), tell: Callable[[RunEvent], None] = lambda event: None
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    events: list[tuple[str, str]] = []

    def report(event: RunEvent) -> None:
        events.append((event.cell.name, event.what))
        tell(event)

    failures = run_all(out, cells(out), jobs=jobs, threads=3, devices=devices, tell=report)
    return failures, events


def interrupt_when_ready(out: Path, names: Sequence[str]) -> None:
    """Ctrl-C, once these runs are there to hear of it."""
    deadline = time.monotonic() + 30
    while not all((out / "runs" / name / "ready").exists() for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def test_starts_come_first_and_nothing_runs_twice(out: Path) -> None:
    failures, events = run(out)
    assert failures == {}
    assert events[:2] == [(ALL[0], "started"), (ALL[0], "finished")], "nobody starts before there is a start"
    assert [name for name, what in events if what == "started"] == ALL
    assert sorted(name for name, what in events if what == "finished") == sorted(ALL)
    assert {(out / "runs" / name / "seen").read_text() for name in ALL} == {"3 as it was"}
    assert run(out) == ({}, [])


def test_devices_are_taken_in_turn_by_as_many_runs_as_there_are_jobs(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAITING", "lsq-w4a4-seed0 mec-w4a4-seed0 lsq-w4a4-seed1")
    seen: list[str] = []

    def stop(event: RunEvent) -> None:
        seen.append(event.what)
        if seen.count("started") == 4:  # the start, and then all three jobs
            interrupt_when_ready(out, ALL[1:4])

    with pytest.raises(KeyboardInterrupt):
        run(out, jobs=3, devices=("4", "7"), tell=stop)
    assert sorted((out / "runs" / name / "seen").read_text() for name in ALL[1:4]) == ["3 4", "3 4", "3 7"]


def test_a_failing_run_is_told_and_tried_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILING", ALL[1])
    failures, events = run(out)
    assert failures == {ALL[1]: f"no room left in {ALL[1]}"}
    assert [name for name, what in events if what == "finished"] and len(events) == 10, "the others go on"
    monkeypatch.setenv("FAILING", "")
    assert run(out) == ({}, [(ALL[1], "resumed"), (ALL[1], "finished")])


def test_what_starts_from_a_failed_run_is_not_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILING", ALL[0])
    failures, events = run(out)
    assert failures[ALL[0]] == f"no room left in {ALL[0]}"
    assert {failures[name] for name in ALL[1:]} == {f"its start, {ALL[0]}, failed"}
    assert [name for name, what in events if what == "started"] == [ALL[0]]


def test_ctrl_c_reaches_every_process_once_and_waits_for_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAITING", " ".join(ALL[1:]))

    def interrupt(event: RunEvent) -> None:
        if event.cell.name == ALL[2]:
            interrupt_when_ready(out, ALL[1:3])

    with pytest.raises(KeyboardInterrupt):
        run(out, tell=interrupt)
    for name in ALL[1:3]:
        assert (out / "runs" / name / "signals").read_text() == "SIGINT "
    monkeypatch.setenv("WAITING", "")
    failures, events = run(out)
    assert failures == {} and events[0] == (ALL[1], "resumed")


def test_a_folder_that_another_process_writes_to_is_waited_for(out: Path) -> None:
    busy = out / "runs" / ALL[1]
    busy.mkdir()
    lock = locked(busy)
    lock.__enter__()
    waited: list[str] = []

    def release(event: RunEvent) -> None:
        if event.what == "waiting":
            waited.append(event.cell.name)
            lock.__exit__(None, None, None)

    failures, _ = run(out, jobs=1, tell=release)
    assert failures == {} and waited == [ALL[1]]


def test_a_run_whose_settings_changed_is_refused(out: Path) -> None:
    run(out)
    require_unchanged(out, cells(out, STUDY.replace("[0, 1]", "[0, 1, 2]") + '[methods.new]\nmethod = "lsq"\n'))
    require_unchanged(out, cells(out, STUDY.replace("[0, 1]", "[1]")))
    require_unchanged(out, cells(out, STUDY.replace("[base]", '[base]\ndevice = "cpu"')))
    with pytest.raises(UserError, match="run mec-w4a4-seed0: mec.beta is 0.5, but .* was started with 0.1. Change it"):
        require_unchanged(out, cells(out, STUDY + "mec.beta = 0.5\n"))


def test_a_start_that_is_gone_is_missed(out: Path) -> None:
    run(out)
    for path in (out / "runs" / ALL[0]).iterdir():
        path.unlink()
    with pytest.raises(UserError, match="lsq-w4a4-seed0 started from .*start-seed0, which is gone"):
        require_unchanged(out, cells(out))


def test_a_resumed_run_may_compute_elsewhere(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILING", ALL[1])
    run(out)
    monkeypatch.setenv("FAILING", "")
    settings = out / "runs" / ALL[1] / "run.toml"
    write_atomically(settings, settings.read_bytes().replace(b'device = "auto"', b'device = "cuda"'))
    run(out)
    assert 'device = "auto"' in settings.read_text(), "as the study says now"
    assert (out / "runs" / ALL[1] / FINAL).exists()


def test_a_command_that_is_no_run_says_why_it_failed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("test", "--out", str(out / "runs" / "tested"), "--resume")
    assert run_command(out, command, threads=3, device="7") is None
    assert (out / "runs" / "tested" / "seen").read_text() == "3 7"
    monkeypatch.setenv("FAILING", "tested")
    assert run_command(out, command, threads=3, device=None) == "no room left in tested"
