"""`mecdeploy train` with real files: what it leaves, what it refuses, how it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from calling import TINY, Call, largest_file
from PIL import Image

from mecdeploy.config import read_config

IMAGES_PER_CLASS = 8


def image_folder(root: Path, classes: tuple[str, ...]) -> Path:
    for shade, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(IMAGES_PER_CLASS):
            Image.new("L", (8, 8), 40 + 90 * shade + index).save(root / name / f"{index}.png")
    return root


def test_a_run_leaves_its_config_metrics_and_checkpoint(call: Call, tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text('method = "lsq"\nseed = 5\n[quant]\nweight_bits = 2\nact_bits = 2\n')
    out = tmp_path / "run"
    outcome = call("train", "--config", settings, "--act-bits", 4, "--out", out, *TINY)
    assert outcome.code == 0, outcome.err
    assert "quantised (lsq)" in outcome.out and f"mecdeploy export {out}" in outcome.out
    assert "full precision: 1 epochs" in outcome.err and "validation" in outcome.err and "images/s" in outcome.err
    config = read_config(out / "run.toml")
    assert (config.method, config.seed, config.quant.weight_bits, config.quant.act_bits) == ("lsq", 5, 2, 4)
    assert config.schedule.frozen_epochs == 1, "half of the epochs"
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(record["stage"], record["epoch"]) for record in records] == [("fp32", 1), ("qat", 1), ("deploy", 1)]
    assert all(0 <= record["validation_accuracy"] <= 1 for record in records)
    assert (out / "checkpoint-final.safetensors").is_file()


def test_the_default_folder_names_the_run(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("train", "--method", "fp32", *TINY).code == 0
    assert os.listdir(tmp_path / "runs") == ["digits-resnet8-fp32-seed0"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weight-bits", "5"], "quant.weight_bits is 5; choose one of 1, 2, 3, 4, 8"),
        (["--act-bits", "0"], "quant.act_bits is 0"),
        (["--method", "lqs"], "method is 'lqs'"),
        (["--epochs", "many"], "'many' is not a valid integer"),
        (["--epochs", "-1"], "schedule.epochs is -1"),
        (["--seed", "-1"], "seed is -1"),
        (["--device", "gpu"], "device is 'gpu'"),
        (["--model", "resnet9"], "Did you mean resnet8"),
        (["--data", "digit"], "Did you mean digits"),
        (["--data", "imagefolder:nowhere"], "'nowhere' does not exist"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--config", "nowhere.toml"], "nowhere.toml: no such config file"),
        (["--weigth-bits", "4"], "--weight-bits"),
        (["extra"], "unexpected extra argument"),
        (["--resume"], "--resume needs --out"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in call("train", *arguments).error
    assert os.listdir(tmp_path) == []


def test_cuda_without_one(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device is cuda" in call("train", "--device", "cuda", "--out", tmp_path / "run").error
    assert os.listdir(tmp_path) == []


def test_an_unknown_key_is_blamed_on_the_file(call: Call, tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("[schedule]\nepoch = 3\n")
    error = call("train", "--config", settings, "--out", tmp_path / "run").error
    assert f"{settings}: unknown key 'schedule.epoch'; did you mean 'schedule.epochs'?" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("classes", "words"), [((), "no"), (("only",), "class")], ids=["empty folder", "one class"])
def test_folders_without_classes(call: Call, tmp_path: Path, classes: tuple[str, ...], words: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    image_folder(data, classes)
    error = call("train", "--data", f"imagefolder:{data}", "--out", tmp_path / "run", *TINY).error
    assert str(data) in error and words in error
    assert not (tmp_path / "run").exists()


def test_an_unreadable_image_is_named_and_can_be_skipped(call: Call, tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data", ("dark", "light"))
    (data / "dark" / "3.png").write_bytes(b"no picture")
    arguments = ["train", "--data", f"imagefolder:{data}", "--out", str(tmp_path / "run"), *TINY]
    error = call(*arguments).error
    assert str(data / "dark" / "3.png") in error and "--skip-bad-images" in error
    assert not (tmp_path / "run").exists()
    outcome = call(*arguments, "--skip-bad-images")
    assert outcome.code == 0, outcome.err
    assert read_config(tmp_path / "run" / "run.toml").data.skip_bad_images


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_weights_from_a_damaged_checkpoint(call: Call, run: Path, tmp_path: Path, damage: str) -> None:
    whole = (run / "checkpoint-final.safetensors").read_bytes()
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"a poem, not a checkpoint")
    assert "bad.safetensors" in call("train", "--weights", bad, "--out", tmp_path / "run").error
    assert os.listdir(tmp_path) == ["bad.safetensors"]


def test_an_existing_run_is_not_overwritten(call: Call, run: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert "add --resume to continue it, or choose another --out" in call("train", "--out", run).error
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_finished_run_is_not_resumed_under_other_settings(call: Call, run: Path) -> None:
    before = sorted(os.listdir(run))
    error = call("train", "--resume", "--out", run, "--weight-bits", 2).error
    assert f"quant.weight_bits is 2, but {run} was started with 4. Drop it, or start another run." in error
    assert call("train", "--resume", "--out", run, "--device", "auto").code == 0, "it may move to another device"
    assert sorted(os.listdir(run)) == before


def test_resume_needs_a_run_and_nothing_else(call: Call, run: Path) -> None:
    assert "leave out --config" in call("train", "--resume", "--out", run, "--config", "x.toml").error
    assert "has no run.toml" in call("train", "--resume", "--out", run.parent).error


def test_output_that_cannot_be_written(call: Call) -> None:
    # /proc takes no folder from anybody, not even from root.
    assert "/proc/run" in call("train", "--out", "/proc/run").error


def test_a_disk_that_fills_up_while_training(call: Call, tmp_path: Path) -> None:
    with largest_file(50_000):  # run.toml fits, a checkpoint does not
        assert "checkpoint-" in call("train", "--out", tmp_path / "run", *TINY).error
    assert os.listdir(tmp_path) == []


def test_a_loss_that_is_not_finite(call: Call, tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text("[schedule]\nfp_epochs = 1\nepochs = 1\nlearning_rate = 1e38\n")
    error = call("train", "--config", settings, "--device", "cpu", "--out", tmp_path / "run").error
    assert "qat" in error or "deploy" in error, "it says where"
    assert "learning" in error, "it says what to do"
    kept = [name for name in os.listdir(tmp_path / "run") if name.startswith("checkpoint-")]
    assert kept == ["checkpoint-fp32-0001.safetensors"]


def test_ctrl_c_saves_and_resume_completes(environment: dict[str, str], call: Call, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "mecdeploy", "train", "--out", str(out), "--fp-epochs", "3", "--epochs", "1"]
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"Continue with: mecdeploy train --resume --out {out}" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert "quant.weight_bits" in call("train", "--resume", "--out", out, "--weight-bits", 2).error
    outcome = call("train", "--resume", "--out", out)
    assert outcome.code == 0, outcome.err
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(record["stage"], record["epoch"]) for record in records] == [
        ("fp32", 1),
        ("fp32", 2),
        ("fp32", 3),
        ("deploy", 1),
    ]
