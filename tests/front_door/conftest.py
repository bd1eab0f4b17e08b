"""One small finished run for all front-door tests, and two ways to call the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mecdeploy

sys.path.insert(0, str(Path(__file__).parent))  # so that these tests find calling.py under any pytest import mode
from calling import Call, Outcome  # noqa: E402


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process, as the console script does."""
    from mecdeploy.cli import main

    def run(*arguments: str | Path) -> Outcome:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return Outcome(exit.value.code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For child processes that run outside the checkout: they find the same mecdeploy as this process."""
    return {**os.environ, "PYTHONPATH": str(Path(mecdeploy.__file__).parents[1]), "PYTHONWARNINGS": "error"}


@pytest.fixture
def call_apart(environment: dict[str, str], tmp_path: Path) -> Call:
    """Run a command in a process of its own, in an empty folder."""

    def run(*arguments: str | Path) -> Outcome:
        command = [sys.executable, "-m", "mecdeploy", *map(str, arguments)]
        found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        return Outcome(found.returncode, found.stdout, found.stderr)

    return run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished W4A4 run on digits; tests only read it."""
    from mecdeploy import QuantConfig, ScheduleConfig, TrainConfig, train

    out = tmp_path_factory.mktemp("runs") / "digits"
    schedule = ScheduleConfig(fp_epochs=2, epochs=2, frozen_epochs=1)
    train(TrainConfig(device="cpu", quant=QuantConfig(weight_bits=4, act_bits=4), schedule=schedule), out)
    return out


@pytest.fixture(scope="session")
def model(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its exported file; tests only read it."""
    from mecdeploy import export

    return export(run, out=tmp_path_factory.mktemp("models") / "digits.onnx").path


@pytest.fixture(scope="session")
def digit_images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Ten 8x8 PNG files, the first of each class in scikit-learn's order."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("images")
    digits = load_digits()
    paths = []
    for label in range(10):
        pixels = digits.images[np.flatnonzero(digits.target == label)[0]]
        paths.append(folder / f"{label}.png")
        Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8)).save(paths[-1])
    return paths
