"""`mecdeploy export`: one file, whole or absent, and a reason whenever there is none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import onnx
import pytest
from calling import Call, largest_file

import mecdeploy


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_the_file_says_where_it_comes_from(call: Call, run: Path, tmp_path: Path) -> None:
    outcome = call("export", run, "--out", tmp_path / "model.onnx")
    assert outcome.code == 0, outcome.err
    assert f"mecdeploy check {run} {tmp_path / 'model.onnx'}" in outcome.out
    assert "4 bits" in outcome.out and "KB" in outcome.out
    model = onnx.load(tmp_path / "model.onnx")
    assert (model.producer_name, model.producer_version) == ("mecdeploy", mecdeploy.__version__)
    props = metadata(tmp_path / "model.onnx")
    assert json.loads(props["mecdeploy.class_names"]) == [str(digit) for digit in range(10)]
    checkpoint = (run / "checkpoint-final.safetensors").read_bytes()
    assert props["mecdeploy.checkpoint_sha256"] == hashlib.sha256(checkpoint).hexdigest()


def test_the_default_place_is_the_run_and_is_replaced(call: Call, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "model.onnx").write_bytes(b"an older export")
    assert call("export", copy).code == 0
    assert metadata(copy / "model.onnx")["mecdeploy.target"] == "onnxruntime"
    assert call("export", copy, "--target", "portable", "--input", "float").code == 0
    assert metadata(copy / "model.onnx")["mecdeploy.target"] == "portable"
    assert json.loads(metadata(copy / "model.onnx")["mecdeploy.input"])["dtype"] == "float32"


def test_wider_bits_are_packed_wider(call: Call, run: Path, tmp_path: Path) -> None:
    assert call("export", run, "--bits", 8, "--out", tmp_path / "wide.onnx").code == 0
    props = metadata(tmp_path / "wide.onnx")
    assert set(json.loads(props["mecdeploy.weight_bits"]).values()) == {8}
    assert 4 in json.loads(props["mecdeploy.trained_bits"]).values()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "2"], "trained at 4 bits"),
        (["--bits", "5"], "export.bits is 5"),
        (["--target", "tensorrt"], "export.target is 'tensorrt'"),
        (["--input", "int8"], "export.input is 'int8'"),
        (["--out", "/proc/model.onnx"], "/proc/model.onnx"),
        (["--out", "missing/model.onnx"], "missing/model.onnx: No such file or directory. Create the folder first."),
        (["--out", "."], "Is a directory"),
    ],
)
def test_refusals_leave_nothing(
    call: Call, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(run))
    assert words in call("export", run, *arguments).error
    assert os.listdir(tmp_path) == [] and sorted(os.listdir(run)) == before


def test_folders_that_are_no_finished_run(call: Call, run: Path, tmp_path: Path) -> None:
    assert "does not exist" in call("export", tmp_path / "none").error
    assert "has no run.toml" in call("export", tmp_path).error
    unfinished = Path(shutil.copytree(run, tmp_path / "unfinished"))
    (unfinished / "checkpoint-final.safetensors").unlink()
    assert "resume" in call("export", unfinished).error
    assert not (unfinished / "model.onnx").exists()


def test_a_full_precision_run_has_nothing_to_export(call: Call, tmp_path: Path) -> None:
    assert call("train", "--method", "fp32", "--fp-epochs", 1, "--device", "cpu", "--out", tmp_path / "run").code == 0
    assert "method fp32" in call("export", tmp_path / "run").error


def test_a_truncated_checkpoint(call: Call, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    checkpoint = copy / "checkpoint-final.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert "checkpoint-final.safetensors" in call("export", copy).error
    assert not (copy / "model.onnx").exists()


def test_a_disk_that_is_full(call: Call, run: Path, tmp_path: Path) -> None:
    with largest_file(10_000):
        error = call("export", run, "--out", tmp_path / "model.onnx").error
    assert error.startswith(f"Error: {tmp_path / 'model.onnx'}: ")
    assert os.listdir(tmp_path) == []
