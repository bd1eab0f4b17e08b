"""--labels none on the command line: from a folder of images to a checked file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from calling import Call

QAT = ["--epochs", "2", "--device", "cpu"]


@pytest.fixture(scope="session")
def teacher(run: Path) -> Path:
    """The full-precision weights of a finished run."""
    return run / "checkpoint-final.safetensors"


@pytest.fixture(scope="session")
def write_digits(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Writes digits first to end as PNG files; name: of label and index."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()

    def write(first: int, end: int, name: Callable[[int, int], Path]) -> None:
        for index in range(first, end):
            path = name(int(digits.target[index]), index)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[index] * 15).astype(np.uint8)).save(path)

    return write


def test_a_flat_folder_is_trained_exported_and_checked(
    call: Call, tmp_path: Path, teacher: Path, write_digits: Callable[..., None]
) -> None:
    images, out = tmp_path / "images", tmp_path / "run"
    write_digits(0, 300, lambda label, index: images / f"{index}.png")
    flags = ["--labels", "none", "--distill", "1", "--weights", teacher]
    outcome = call("train", "--data", f"imagefolder:{images}", *flags, *QAT, "--out", out)
    assert outcome.code == 0, outcome.err
    assert "distill" in outcome.err and "(agreement with the teacher)" in outcome.err
    assert "accuracy" not in outcome.err + outcome.out
    # The heading of a narrow table is folded.
    assert "validation agreement with the teacher" in " ".join(outcome.out.split())
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [epoch["stage"] for epoch in epochs] == ["qat", "deploy"]
    assert {epoch["validation_measure"] for epoch in epochs} == {"agreement with the teacher"}
    assert call("export", out).code == 0
    outcome = call("check", out)
    assert outcome.code == 0, outcome.err
    assert "unknown: the images have no labels" in outcome.out and "top-1 agreement" in outcome.out
    parity = json.loads((out / "parity.json").read_text())
    assert parity["passed"] is True and parity["integers_different"] == 0
    assert parity["accuracy_torch"] is None and parity["accuracy_onnxruntime"] is None
    assert call("report", out).code == 0
    facts, page = json.loads((out / "report.json").read_text()), (out / "report.html").read_text()
    assert facts["accuracy"]["measure"] == "agreement with the teacher" and facts["accuracy"]["full_precision"] == 1
    assert facts["accuracy"]["onnxruntime"] == 1 - facts["answers"]["changed"] / facts["answers"]["images"]
    assert facts["answers"]["confusion"] is None and facts["answers"]["mistake_pictures"] == []
    assert "Agreement with the teacher in onnxruntime" in page and "The validation images have no labels" in page
    assert parity["top1_agreement"] == 1.0
    import onnx

    metadata = {entry.key: entry.value for entry in onnx.load(out / "model.onnx").metadata_props}
    assert json.loads(metadata["mecdeploy.class_names"]) == list("0123456789")
    assert call("sensitivity", out).error == (
        f"Error: {out} was trained without labels (data.labels is none), and sensitivity measures the cross entropy of "
        "training images; study a run on labelled images instead."
    )


def test_labelled_validation_images_give_accuracies_and_a_run_outlives_its_weights(
    call: Call, tmp_path: Path, teacher: Path, write_digits: Callable[..., None]
) -> None:
    """From a plain state dict, with the teacher's features alone; the weights are gone when the run is resumed."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(teacher)
    weights = tmp_path / "plain.safetensors"
    save_file({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("float.")}, weights)
    images, out, settings = tmp_path / "images", tmp_path / "run", tmp_path / "settings.toml"
    write_digits(0, 200, lambda label, index: images / "train" / f"{index}.png")
    write_digits(1000, 1060, lambda label, index: images / "val" / str(label) / f"{index}.png")
    settings.write_text(f'weights = "{weights}"\n[data]\nlabels = "none"\n[mec]\nviews = "teacher"\n')
    outcome = call("train", "--config", settings, "--data", f"imagefolder:{images}", *QAT, "--out", out)
    assert outcome.code == 0, outcome.err
    assert "validation accuracy" in " ".join(outcome.out.split()) and "distill" not in outcome.err
    weights.unlink()
    (out / "checkpoint-final.safetensors").unlink()
    assert call("train", "--resume", "--out", out).code == 0
    assert call("export", out).code == 0 and call("check", out).code == 0
    assert isinstance(json.loads((out / "parity.json").read_text())["accuracy_torch"], float)
    assert call("representation", out).code == 0, "on validation images, which have labels"
    assert "the training images have no labels" in call("hessian", out).error


def test_what_is_missing_is_said(call: Call, tmp_path: Path, teacher: Path) -> None:
    out = tmp_path / "run"
    start = ["train", "--data", "digits", "--labels", "none", *QAT, "--out", out]
    assert "name one in weights (--weights)" in call(*start).error
    assert "set distill.weight = 1 (--distill 1)" in call(*start, "--weights", teacher).error
    assert "set schedule.fp_epochs = 0" in call(*start, "--weights", teacher, "--fp-epochs", "1").error
    assert "data.labels is 'some'; choose one of given, none." in call("train", "--labels", "some").error
    assert not out.exists()
