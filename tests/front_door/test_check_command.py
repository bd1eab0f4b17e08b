"""`mecdeploy check`: what it writes and what it says when a file does not compute what was trained."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from calling import Call
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table

KEYS = {
    "integers_compared",
    "integers_different",
    "top1_agreement",
    "accuracy_torch",
    "accuracy_onnxruntime",
    "max_logit_difference",
    "float_convolutions",
    "exact_end_to_end",
    "float_islands",
    "islands",
    "float_operators",
    "packed_bits",
    "passed",
    "versions",
    "cpu",
}


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def damage(model: Path, suffix: str, to: Path) -> Path:
    """One integer of the first initialiser of this name, off by one."""
    proto = onnx.load(model)
    tensor = next(t for t in proto.graph.initializer if t.name.endswith(suffix))
    values = numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[0] += 1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, to)
    return to


def test_a_good_file_passes(call: Call, copy: Path, model: Path) -> None:
    outcome = call("check", copy, model)
    assert outcome.code == 0, outcome.out + outcome.err
    assert "passed" in outcome.out and "integers different" in outcome.out
    parity = json.loads((copy / "parity.json").read_text())
    assert set(parity) >= KEYS
    assert parity["passed"] is True
    assert parity["integers_compared"] > 100_000 and parity["integers_different"] == 0
    assert parity["float_convolutions"] == 0
    assert parity["top1_agreement"] == 1.0 and parity["max_logit_difference"] == 0.0
    assert {"torch", "onnxruntime", "mecdeploy"} <= set(parity["versions"])
    assert set(parity["packed_bits"].values()) == {4, 8}


def test_the_default_file_is_the_runs(call: Call, copy: Path, model: Path) -> None:
    assert "mecdeploy export" in call("check", copy).error
    assert not (copy / "parity.json").exists()
    shutil.copy(model, copy / "model.onnx")
    assert call("check", copy).code == 0


def test_the_table_tells_what_runs_in_float(copy: Path, model: Path) -> None:
    """A report with two float islands, as a terminal of 80 columns shows it; without islands no such row."""
    from mecdeploy import check, tables
    from mecdeploy.runtime_checks.report import IslandReport

    report = check(copy, model)
    assert "island" not in shown(tables.parity(report))
    islands = tuple(
        IslandReport(
            name=name,
            operators=operators,
            reason="no integer kernel",
            kernels={},
            compared=12_000,
            different=2,
            max_difference=1.0,
            values=(),
        )
        for name, operators in (("norm", ("layer_norm",)), ("attend", ("softmax", "layer_norm")))
    )
    operators = {"Softmax": 1, "LayerNormalization": 2}
    table = tables.parity(
        dataclasses.replace(report, exact_end_to_end=False, float_islands=2, islands=islands, float_operators=operators)
    )
    text = shown(table)
    assert "2: layer_norm 2, softmax 1" in text
    assert "24,000, 4 differ" in text
    assert "LayerNormalization 2, Softmax 1" in text


def shown(table: Table) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_damaged_file_fails_and_names_the_unit(call: Call, copy: Path, model: Path, tmp_path: Path) -> None:
    bad = damage(model, "conv1/bias", tmp_path / "bad.onnx")
    outcome = call("check", copy, bad)
    assert outcome.code == 1
    assert "FAILED" in outcome.out and "conv1" in outcome.out
    failures = [line for line in outcome.err.splitlines() if line.startswith("Failed: ")]
    assert any("conv1" in line for line in failures)
    parity = json.loads((copy / "parity.json").read_text())
    assert parity["passed"] is False and parity["first_different_unit"] == "conv1"
    assert parity["integers_different"] > 0


def test_another_runs_file_is_said_to_be_one(call: Call, copy: Path, model: Path, tmp_path: Path) -> None:
    proto = onnx.load(damage(model, "conv1/bias", tmp_path / "other.onnx"))
    for entry in proto.metadata_props:
        if entry.key == "mecdeploy.checkpoint_sha256":
            entry.value = "0" * 64
    onnx.save(proto, tmp_path / "other.onnx")
    outcome = call("check", copy, tmp_path / "other.onnx")
    assert outcome.code == 1
    assert "was exported from another checkpoint" in outcome.err.splitlines()[0]


def test_files_that_are_no_model_of_ours(call: Call, copy: Path, model: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(model.read_bytes()[:2000])
    foreign = tmp_path / "foreign.onnx"
    proto = onnx.load(model)
    del proto.metadata_props[:]
    onnx.save(proto, foreign)
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    for path in (truncated, foreign, text, tmp_path / "none.onnx"):
        assert path.name in call("check", copy, path).error
    assert not (copy / "parity.json").exists()


def test_reference_is_the_model_it_wraps(run: Path) -> None:
    import torch

    from mecdeploy.reference import TorchReference
    from mecdeploy.training.run import load_run

    model = load_run(run).model
    pixels = np.arange(5 * 64, dtype=np.uint8).reshape(5, 1, 8, 8)
    reference = TorchReference(model)
    expected = model.eval()(torch.from_numpy(pixels)).detach().numpy()
    np.testing.assert_array_equal(reference.logits(pixels), expected)
    integers = reference.integers(pixels)
    np.testing.assert_array_equal(integers["logits"], expected)
    assert integers["conv1"].dtype == np.uint8


def test_validation_images_need_not_fit_in_memory() -> None:
    from mecdeploy import DataConfig, certificate
    from mecdeploy.training.data import load_dataset

    source = load_dataset(DataConfig(name="digits"), seed=0).validation
    stacked = certificate.on_disk(source)
    assert isinstance(stacked, np.memmap)
    np.testing.assert_array_equal(stacked, next(iter(source.batches(len(source)))).images[0].numpy())


def test_the_certificate_says_of_which_bytes_and_no_longer_stands_when_they_change(
    run: Path, model: Path, tmp_path: Path
) -> None:
    import hashlib
    from datetime import UTC, datetime, timedelta

    from mecdeploy import certificate
    from mecdeploy.run_folder import require_run
    from mecdeploy.training.run import load_run

    copied = Path(shutil.copytree(run, tmp_path / "run"))
    file = Path(shutil.copy(model, copied / "model.onnx"))
    folder, loaded = require_run(copied), load_run(copied)
    shown = certificate.validation_images(folder.read_config(), loaded.class_names)
    assert certificate.standing_certificate(folder, loaded, file, shown) is None  # no check yet
    certificate.certify(folder, loaded, file, shown, None)
    found = certificate.standing_certificate(folder, loaded, file, shown)
    assert found == json.loads((copied / "parity.json").read_text())
    assert found["model_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found["checkpoint_sha256"] == hashlib.sha256(loaded.checkpoint.read_bytes()).hexdigest()
    assert datetime.now(UTC) - datetime.fromisoformat(found["date"]) < timedelta(hours=1)

    others = certificate.ValidationImages(images=255 - shown.images, labels=shown.labels)
    assert certificate.standing_certificate(folder, loaded, file, others) is None
    elsewhere = {**found, "cpu": {**found["cpu"], "model": "another processor"}}
    for damaged in (json.dumps(elsewhere), "[]", "{", json.dumps({**found, "versions": {}})):
        (copied / "parity.json").write_text(damaged)
        assert certificate.standing_certificate(folder, loaded, file, shown) is None
    (copied / "parity.json").write_text(json.dumps(found))
    assert certificate.standing_certificate(folder, loaded, file, shown) == found
    damage(file, "fc/weight", file)
    assert certificate.standing_certificate(folder, loaded, file, shown) is None
