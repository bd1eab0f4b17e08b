"""Slow: every classifier of torchvision by the command line, from a folder of photographs to a passed check.

    pytest -m slow tests/zoo

Half a minute to five a network; all of them take some hours on two cores.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from mecdeploy.cli import main

NAMES = torchvision.models.list_models(module=torchvision.models)
SIDE = 64  # pixels, unless the network cannot take it
SIDES = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56, "vgg": 32}
"""By family or name. VGG pools to 7x7 positions: from 1x1 or 7x7, as here or at 224, that is an integer kernel."""
WITH_ISLANDS = ("convnext", "maxvit", "swin", "vit")
GIANTS = {"regnet_y_128gf", "vit_h_14"}
GIANTS_TAKE = 40e9
"""Bytes: six times their 2.6 GB of weights (float, momentum, gradient, checkpoints on their way), and room."""

SETTINGS = """
[data]
image_size = {side}
workers = 0
[schedule]
batch_size = 4
calibration_images = 8
fp_learning_rate = 1e-4
learning_rate = 1e-4
"""
"""Small rates: networks without BatchNorm diverge at the usual ones when they start from random weights."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name in ("sea", "wood"):
        (folder / name).mkdir()
        for index in range(8):
            coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)  # smooth when enlarged, as photographs are
            Image.fromarray(coarse).resize((80, 80), Image.Resampling.BICUBIC).save(folder / name / f"{index}.png")
    return folder


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert isinstance(exit.value.code, int)
    return exit.value.code


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_by_its_name_from_photographs_to_a_passed_check(
    name: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if name in GIANTS and memory < GIANTS_TAKE:
        pytest.skip(f"{name} needs {GIANTS_TAKE / 1e9:.0f} GB of memory, there are {memory / 1e9:.0f}")
    settings, run = tmp_path / "settings.toml", tmp_path / "run"
    side = next((side for start, side in SIDES.items() if name.startswith(start)), SIDE)
    settings.write_text(SETTINGS.format(side=side))
    train = ["train", "--config", settings, "--data", f"imagefolder:{photos}", "--model", name, "--out", run]
    train += ["--device", "cpu", "--method", "lsq", "--weight-bits", 4, "--act-bits", 4]
    assert call(*train, "--fp-epochs", 1, "--epochs", 1) == 0, capsys.readouterr().err
    assert call("export", run) == 0, capsys.readouterr().err
    assert call("check", run) == 0, capsys.readouterr().err
    parity = json.loads((run / "parity.json").read_text())
    assert parity["passed"] and parity["integers_different"] == 0 and parity["integers_compared"] > 10_000
    assert parity["float_convolutions"] == 0 and parity["integer_convolutions"] > 0
    assert parity["exact_end_to_end"] is not name.startswith(WITH_ISLANDS)
