"""The command line as a whole: exit codes, one-line errors, help that costs nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from calling import Call

import mecdeploy
from mecdeploy.errors import UserError
from mecdeploy.failures import explain

HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "numpy", "rich", "sklearn", "safetensors", "PIL")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["--version"]])
def test_what_needs_nothing_heavy_imports_nothing_heavy(
    environment: dict[str, str], tmp_path: Path, arguments: list[str]
) -> None:
    """The promise is 0.3 s; counting modules instead of seconds makes it hold on a busy machine too."""
    script = (
        "import sys\n"
        "from mecdeploy.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as exit:\n    assert not exit.code, exit.code\n"
        f"heavy = set({HEAVY!r}) & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0, found.stderr
    assert ("mecdeploy" in found.stdout) and not found.stderr


def test_every_command_has_help(call: Call) -> None:
    overview = call("--help").out
    for command in ("train", "export", "check", "predict", "demo"):
        assert command in overview
        outcome = call(command, "--help")
        assert outcome.code == 0 and outcome.out.startswith(f"Usage: mecdeploy {command}")


def test_version(call: Call) -> None:
    assert call("--version").out.strip().endswith(mecdeploy.__version__)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["trian"], "No such command 'trian'"), (["--trian"], "--trian"), (["export"], "RUN"), (["check"], "RUN")],
)
def test_usage_errors_are_one_line(call: Call, arguments: list[str], words: str) -> None:
    outcome = call(*arguments)
    assert words in outcome.error and len(outcome.err.splitlines()) == 1 and outcome.out == ""


def test_a_reader_who_leaves_early_is_no_error(environment: dict[str, str], tmp_path: Path) -> None:
    command = f"{sys.executable} -m mecdeploy train --help | true"
    found = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert found.stderr == ""


def test_a_users_error_becomes_one_line() -> None:
    from mecdeploy.export.errors import ExportError
    from mecdeploy.runtime_checks.errors import CheckError
    from mecdeploy.training.errors import TrainingError

    for kind in (UserError, TrainingError, ExportError, CheckError):
        assert explain(kind("first\n  second")) == "first second"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "out/run.toml: No space left on device. Free some space"),
        (errno.EROFS, "out/run.toml: Read-only file system. Choose an --out"),
        (errno.EACCES, "out/run.toml: Permission denied. Choose another --out"),
    ],
)
def test_a_machines_refusal_becomes_one_line(code: int, words: str) -> None:
    explained = explain(OSError(code, os.strerror(code), "out/run.toml"))
    assert explained is not None and explained.startswith(words)


def test_a_gpu_out_of_memory_is_the_users() -> None:
    import torch

    explained = explain(torch.OutOfMemoryError("CUDA out of memory"))
    assert explained is not None and "schedule.batch_size" in explained


def test_a_bug_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    from mecdeploy import api
    from mecdeploy.cli import main

    def broken(*arguments: object, **options: object) -> None:
        raise KeyError("a bug")

    assert explain(KeyError("a bug")) is None and explain(ValueError("a bug")) is None
    monkeypatch.setattr(api, "export", broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["export", "run"])


def test_an_interrupt_outside_training(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    from mecdeploy import api

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "export", interrupted)
    outcome = call("export", "run")
    assert (outcome.code, outcome.err.strip()) == (130, "Interrupted.")


def test_an_interrupted_demo_promises_no_folder(monkeypatch: pytest.MonkeyPatch, call: Call, tmp_path: Path) -> None:
    from mecdeploy import demo
    from mecdeploy.training.events import TrainingInterrupted

    def interrupted(*arguments: object, **options: object) -> None:
        raise TrainingInterrupted(tmp_path / "checkpoint-fp32-0001.safetensors", stage="fp32", epoch=1, step=0)

    monkeypatch.setattr(demo, "run_demo", interrupted)
    outcome = call("demo")
    assert (outcome.code, outcome.err.strip()) == (130, "Interrupted.")
    outcome = call("demo", "--out", tmp_path / "run")
    assert outcome.code == 130 and f"mecdeploy train --resume --out {tmp_path / 'run'}" in outcome.err
