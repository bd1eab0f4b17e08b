"""`mecdeploy sensitivity`: settings that train as they are, sizes as exported, nothing spent on validation images."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from calling import Call

import mecdeploy
from mecdeploy.training.bit_allocation import packed_size
from mecdeploy.training.data import ImageDataset

FEW = ["--images", "64", "--device", "cpu"]
WRITTEN = ["sensitivity.json", "sensitivity.toml"]


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may write to."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def stored_weight_bytes(path: Path) -> int:
    """Bytes of every packed weight in a file and of the table that unpacks 3-bit ones, without scales and biases."""
    return sum(
        len(tensor.raw_data)
        for tensor in onnx.load(path).graph.initializer
        if tensor.name.endswith(("/weight", "/weight/packed")) or tensor.name.startswith("table/")
    )


def test_the_proposal_trains_and_exports_at_the_size_it_promised(call: Call, own_run: Path, tmp_path: Path) -> None:
    outcome = call("sensitivity", own_run, "--size", "40%", *FEW)
    assert outcome.code == 0, outcome.err
    assert f"mecdeploy train --config {own_run / 'sensitivity.toml'}" in outcome.out
    found = json.loads((own_run / "sensitivity.json").read_text())
    trained = tmp_path / "mixed"
    flags = ["--epochs", 1, "--device", "cpu", "--out", trained]
    assert call("train", "--config", own_run / "sensitivity.toml", *flags).code == 0
    assert call("export", trained).code == 0
    metadata = {entry.key: entry.value for entry in onnx.load(trained / "model.onnx").metadata_props}
    assert json.loads(metadata["mecdeploy.weight_bits"]) == found["bits"]
    assert len(set(found["bits"].values())) > 1
    promised = next(network["size"] for network in found["networks"] if network["name"] == "proposed")
    assert stored_weight_bytes(trained / "model.onnx") == promised <= found["budget"]
    assert call("check", trained).code == 0


@pytest.mark.parametrize("widths", [(2, 4, 8), (2, 3, 4, 8)])
def test_sizes_are_those_of_the_file(widths: tuple[int, ...], tmp_path: Path) -> None:
    """Layers of odd sizes, so that every width has a last word to fill up."""
    import torch
    from torch import nn

    layers: list[nn.Module] = [nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.ReLU(), nn.Conv2d(7, 3, 1)]
    network = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    counts = {"0": 135, "2": 315, "4": 21, "8": 9}
    bits = {name: widths[index % len(widths)] for index, name in enumerate(counts)}
    spec = mecdeploy.InputSpec.from_statistics(channels=3, height=8, width=8, mean=120, std=60)
    overrides = {name: {"weight_bits": width} for name, width in bits.items()}
    model = mecdeploy.prepare(network.eval(), mecdeploy.QuantConfig(overrides=overrides), spec)
    mecdeploy.calibrate(model, [torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)])
    path = mecdeploy.export(model.eval(), out=tmp_path / "model.onnx").path
    assert stored_weight_bytes(path) == packed_size(counts, bits)


def test_the_settings_are_the_runs_own_but_for_the_widths(call: Call, own_run: Path, tmp_path: Path) -> None:
    settings = tmp_path / "mixed.toml"
    assert call("sensitivity", own_run, "--out", settings, *FEW).code == 0
    assert not (own_run / "sensitivity.toml").exists() and (own_run / "sensitivity.json").exists()
    was, now = tomllib.loads((own_run / "run.toml").read_text()), tomllib.loads(settings.read_text())
    found = json.loads((own_run / "sensitivity.json").read_text())
    assert now["quant"].pop("overrides") == {name: {"weight_bits": bits} for name, bits in found["bits"].items()}
    assert now["schedule"].pop("fp_epochs") == 0
    assert Path(now.pop("weights")) == (own_run / "checkpoint-final.safetensors").resolve()
    was["quant"].pop("overrides"), was["schedule"].pop("fp_epochs"), was.pop("weights")
    assert now == was
    sizes = {network["name"]: network["size"] for network in found["networks"]}
    assert found["budget"] == sizes["this run's widths"]


def test_a_full_precision_run_works_and_the_file_quantises_it(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "fp32"
    assert call("train", "--method", "fp32", "--fp-epochs", 1, "--device", "cpu", "--out", run).code == 0
    assert call("sensitivity", run, "--activations", *FEW).code == 0
    assert mecdeploy.read_config(run / "sensitivity.toml").method == "mec"
    assert json.loads((run / "sensitivity.json").read_text())["activations"]


def test_it_repeats_bit_for_bit(call: Call, own_run: Path) -> None:
    files = []
    for _ in range(2):
        assert call("sensitivity", own_run, *FEW).code == 0
        files.append([(own_run / name).read_bytes() for name in WRITTEN])
    assert files[0] == files[1]


def test_no_validation_image_is_looked_at(call: Call, own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mecdeploy.training import data

    load = data.load_dataset

    class Sealed:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"validation.{name} was read")

    def sealed(*arguments: Any, **options: Any) -> ImageDataset:
        import dataclasses

        return dataclasses.replace(load(*arguments, **options), validation=Sealed())  # type: ignore[arg-type]

    monkeypatch.setattr(data, "load_dataset", sealed)
    assert call("sensitivity", own_run, *FEW).code == 0


def lines_of(text: str) -> Iterator[list[str]]:
    yield from (line.split() for line in text.splitlines() if line.split())


def test_the_tables_say_what_was_measured(call: Call, own_run: Path) -> None:
    outcome = call("sensitivity", own_run, "--activations", *FEW)
    found = json.loads((own_run / "sensitivity.json").read_text())
    rows = list(lines_of(outcome.out))
    assert all(len(line) <= 80 for line in outcome.out.splitlines()[:-2])  # the last two are paths
    first = next(row for row in rows if row[-1] in "2348" and row[1].replace(",", "").isdigit())
    worst = max(found["layers"], key=lambda layer: layer["changes"]["2"]["cross_entropy"])
    assert first[:2] == [worst["name"], f"{worst['weights']:,}"]
    assert first[2:4] == [
        f"{worst['changes']['2']['cross_entropy']:.3f}",
        f"±{worst['changes']['2']['cross_entropy_error']:.3f}",
    ]
    assert int(first[-1]) == found["bits"][worst["name"]]
    names = [" ".join(row) for row in rows]
    for name in ("full precision", "proposed", "this run's widths", "all at 4 bits", "all at 2 bits"):
        assert any(row.startswith(name) for row in names), name
    assert "output of" in outcome.out and "64 training images" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "12"], "size is 12 bytes, but all weights at 2 bits take 19,268; give at least that."),
        (["--size", "20%"], "but all weights at 2 bits take 19,268"),
        (["--size", "much"], "size is 'much'; give bytes (40000, 300KB, 1.2MB, 1MiB) or a share"),
        (["--images", "1"], "'--images'"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--out", "missing/a.toml"], "missing is no folder; create it first"),
    ],
)
def test_refusals_leave_nothing(
    call: Call, own_run: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(own_run)
    before = sorted(os.listdir(own_run))
    assert words in call("sensitivity", own_run, *arguments).error
    assert sorted(os.listdir(own_run)) == before


def test_the_runs_own_settings_are_not_overwritten(call: Call, own_run: Path) -> None:
    before = (own_run / "run.toml").read_bytes()
    assert "choose another --out" in call("sensitivity", own_run, "--out", own_run / "run.toml").error
    assert (own_run / "run.toml").read_bytes() == before


def test_folders_that_are_no_finished_run(call: Call, own_run: Path, tmp_path: Path) -> None:
    assert "does not exist" in call("sensitivity", tmp_path / "none").error
    (own_run / "checkpoint-final.safetensors").unlink()
    assert "has not finished training; resume it" in call("sensitivity", own_run).error
    assert not (own_run / "sensitivity.toml").exists()


def test_from_python(own_run: Path) -> None:
    report = mecdeploy.sensitivity(own_run, size=30_000, images=32, device="cpu")
    assert isinstance(report, mecdeploy.SensitivityReport)
    assert report.settings == own_run / "sensitivity.toml" and report.measurements == own_run / "sensitivity.json"
    assert report.study.budget == 30_000
    overrides = mecdeploy.read_config(report.settings).quant.overrides
    assert {name: widths["weight_bits"] for name, widths in overrides.items()} == dict(report.study.bits)
