"""The commands one after the other, as a stranger runs them."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from quantized_runs import quantized_config

from mecdeploy import api
from mecdeploy.cli import main

CPU_SECONDS = 90.0


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert isinstance(exit.value.code, int)
    return exit.value.code


def test_the_demo_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    assert call("demo") == 0
    # It trains on one thread, so its processor time bounds its time on an idle machine, whatever else runs on this one.
    assert time.process_time() - began < CPU_SECONDS
    shown = capsys.readouterr().out
    full, trained, served = (
        float(share) for share in re.findall(r"accuracy .*", shown)[0].replace("%", "").split()[1:]
    )
    assert served == trained
    assert full > 95 and trained > full - 2
    assert re.search(r"integers compared +[\d,]{7,}", shown)
    assert re.search(r"integers different +0\b", shown)


def test_a_folder_of_colour_photographs_with_mobilenet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for shade, name in enumerate(("sea", "wood")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(24):
            pixels = generator.integers(0, 120, (40, 48, 3)) + np.array([0, 60 * shade, 120 - 60 * shade])
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{index}.jpg")
    settings = tmp_path / "settings.toml"
    settings.write_text("[data]\nimage_size = 32\n[schedule]\nbatch_size = 8\ncalibration_images = 16\n")
    run, photos = tmp_path / "run", f"imagefolder:{tmp_path / 'photos'}"
    train = [
        "train",
        "--config",
        settings,
        "--data",
        photos,
        "--model",
        "mobilenet_v2",
        "--out",
        run,
        "--device",
        "cpu",
    ]
    assert call(*train, "--fp-epochs", 1, "--epochs", 2, "--weight-bits", 4, "--act-bits", 4) == 0
    assert call("export", run) == 0
    assert call("check", run) == 0, capsys.readouterr().err
    parity = json.loads((run / "parity.json").read_text())
    assert parity["passed"] and parity["integers_different"] == 0 and parity["float_convolutions"] == 0
    capsys.readouterr()
    assert call("predict", run / "model.onnx", tmp_path / "photos" / "sea" / "0.jpg") == 0
    assert re.search(r"0\.jpg: (sea|wood) [\d.]+%, (sea|wood) [\d.]+%\n", capsys.readouterr().out)


def test_the_same_seed_gives_the_same_file(resnet8: Path, tmp_path: Path) -> None:
    files = []
    for name in ("first", "second"):
        api.train(quantized_config(resnet8, 4, 4), tmp_path / name)
        model = onnx.load(api.export(tmp_path / name).path)
        for entry in model.metadata_props:
            if entry.key == "mecdeploy.checkpoint_sha256":
                entry.value = ""  # the checkpoint also records how long its epochs took
        files.append(model.SerializeToString())
    assert files[0] == files[1]


def test_another_seed_gives_another_file(resnet8: Path, tmp_path: Path) -> None:
    import dataclasses

    files = []
    for seed in (0, 1):
        api.train(dataclasses.replace(quantized_config(resnet8, 4, 4), seed=seed), tmp_path / str(seed))
        files.append([t.raw_data for t in onnx.load(api.export(tmp_path / str(seed)).path).graph.initializer])
    assert files[0] != files[1]
