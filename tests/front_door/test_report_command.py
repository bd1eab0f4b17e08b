"""`mecdeploy report`: its numbers beside others' of the same run, and what it says when something is missing."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from calling import Call
from numpy.typing import NDArray
from onnx import numpy_helper

from mecdeploy.run_report.writing import RunReport, report

NET = """
from torch import nn

class Norm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(channels, channels, 3, padding=1), Norm(channels), nn.GELU()

    def forward(self, x):
        return x + self.act(self.norm(self.conv(x)))

def make(num_classes):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
    return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), Block(8), *head)
"""


@pytest.fixture(scope="module")
def exported(run: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with its file; tests only read it, or write what they name."""
    folder = Path(shutil.copytree(run, tmp_path_factory.mktemp("reported") / "run"))
    shutil.copy(model, folder / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def reported(exported: Path) -> RunReport:
    return report(exported)


@pytest.fixture(scope="module")
def facts(reported: RunReport) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(reported.data.read_text())
    return found


@pytest.fixture(scope="module")
def validation() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from mecdeploy import DataConfig
    from mecdeploy.training.data import load_dataset

    batch = next(iter(load_dataset(DataConfig(name="digits"), seed=0).validation.batches(1000)))
    return batch.images[0].numpy(), batch.labels.numpy()


@pytest.fixture(scope="module")
def logits(model: Path, validation: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {"pixels": validation[0]})[0]
    return found


def test_it_writes_a_page_and_its_facts(reported: RunReport, exported: Path) -> None:
    assert reported.page == exported / "report.html" and reported.data == exported / "report.json"
    assert reported.passed
    page = reported.page.read_text()
    assert page.startswith("<!doctype html>") and "Exact: onnxruntime computes what was trained" in page
    assert "PyTorch and onnxruntime agree on all 360 images." in page
    assert not list(exported.glob(".*.tmp"))


def test_accuracy_and_confusion_are_those_of_a_session_of_our_own(
    facts: dict[str, Any], validation: tuple[NDArray[np.uint8], NDArray[np.int64]], logits: NDArray[np.float32]
) -> None:
    labels = validation[1]
    guesses = [max(range(10), key=row.__getitem__) for row in logits.tolist()]
    right = sum(int(guess == label) for guess, label in zip(guesses, labels, strict=True))
    assert facts["accuracy"]["onnxruntime"] == facts["accuracy"]["pytorch"] == right / 360
    pairs = Counter(zip(labels.tolist(), guesses, strict=True))
    found = facts["answers"]["confusion"]["counts"]
    assert {(label, guess): count for label, guess, count in found} == dict(pairs)
    assert [count for *_, count in found] == sorted(pairs.values(), reverse=True)


def test_full_precision_is_as_accurate_as_it_was_in_training(facts: dict[str, Any], run: Path) -> None:
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [epoch for epoch in epochs if epoch["stage"] == "fp32"][-1]
    assert facts["accuracy"]["full_precision"] == last["validation_accuracy"]
    assert facts["history"] == epochs


def test_mistakes_are_shown_the_surest_first(
    facts: dict[str, Any], validation: tuple[NDArray[np.uint8], NDArray[np.int64]], logits: NDArray[np.float32]
) -> None:
    labels, real = validation[1], logits.astype(np.float64)
    chances = np.exp(real) / np.exp(real).sum(1, keepdims=True)
    wrong = [index for index in range(360) if real[index].argmax() != labels[index]]
    expected = sorted(wrong, key=lambda index: -chances[index].max())[:12]
    shown = facts["answers"]["mistake_pictures"]
    assert [picture["index"] for picture in shown] == expected and len(expected) > 0
    for picture in shown:
        assert picture["label"] == labels[picture["index"]] and picture["pytorch"] is None
        said = picture["onnxruntime"]
        assert said["guess"] == real[picture["index"]].argmax()
        assert said["confidence"] == pytest.approx(chances[picture["index"]].max())  # float64, both
        assert "png" not in picture


def test_a_picture_is_the_image(reported: RunReport, validation: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> None:
    import base64
    import io

    from PIL import Image

    picture = reported.facts.answers.mistake_pictures[0]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.png))))
    np.testing.assert_array_equal(shown, validation[0][picture.index, 0])


def test_codes_are_those_that_pytorch_computes(
    facts: dict[str, Any], run: Path, validation: tuple[NDArray[np.uint8], NDArray[np.int64]]
) -> None:
    """Over the same images, counted one by one; entropy from the shares."""
    import torch

    from mecdeploy.training.run import load_run

    network = load_run(run).model
    chosen = np.unique(np.linspace(0, 359, 256).round().astype(int))
    assert facts["codes_images"] == len(chosen) == 256
    computed = network.integers(torch.from_numpy(validation[0][chosen]))
    values = {value["name"]: value for layer in facts["layers"] for value in layer["values"]}
    assert set(values) == set(computed) - {"logits"}
    for name, value in values.items():
        assert value["shape"] == list(computed[name].shape[1:])
        if value["histogram"] is None:
            assert name == "flatten"
            continue
        counts = Counter(computed[name].reshape(-1).tolist())
        assert dict(zip(value["histogram"]["codes"], value["histogram"]["counts"], strict=True)) == {
            code: counts[code] for code in range(2 ** value["bits"])
        }
        shares = np.array([count / computed[name].size for count in counts.values()])
        assert value["histogram"]["entropy"] == pytest.approx(-(shares * np.log2(shares)).sum())  # float64
        assert value["histogram"]["levels"] == len(counts)


def test_weights_are_those_of_the_file(facts: dict[str, Any], model: Path) -> None:
    proto = onnx.load(model)
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    promised = json.loads(next(e.value for e in proto.metadata_props if e.key == "mecdeploy.weight_bits"))
    weights = {layer["name"]: layer["weights"] for layer in facts["layers"] if layer["weights"] is not None}
    assert {name: row["bits"] for name, row in weights.items()} == promised
    assert sum(row["share"] for row in weights.values()) == pytest.approx(1)  # float64
    stored = numpy_helper.to_array(initializers["fc/weight"])
    counts = Counter(stored.reshape(-1).tolist())
    histogram = weights["fc"]["histogram"]
    assert dict(zip(histogram["codes"], histogram["counts"], strict=True)) == {c: counts[c] for c in range(-128, 128)}
    scales = numpy_helper.to_array(initializers["fc/weight/scale"])
    assert [weights["fc"]["smallest_scale"], weights["fc"]["largest_scale"]] == [scales.min(), scales.max()]
    assert facts["sizes"]["file"] == model.stat().st_size
    assert sum(facts["kernels"].values()) > len(promised)


def test_the_graph_is_that_of_pytorchs_program(facts: dict[str, Any], run: Path) -> None:
    from mecdeploy.training.run import load_run

    network = load_run(run).model
    home = {"pixels": "pixels"}
    for step in network.program:
        home |= dict.fromkeys(network.unit(step.unit).output_names, step.unit)
    expected = {(home[read], step.unit) for step in network.program for read in step.reads}
    assert {(read, layer["name"]) for layer in facts["layers"] for read in layer["reads"]} == expected
    assert [layer["name"] for layer in facts["layers"]] == [step.unit for step in network.program]


def test_every_layer_has_a_share_of_the_time(facts: dict[str, Any]) -> None:
    shares = [layer["time"] for layer in facts["layers"]]
    assert None not in shares and 0.5 < sum(shares) <= 1 + 1e-9  # the rest are onnxruntime's own nodes; float64
    assert facts["latency"]["quantized"] > 0 and facts["latency"]["ratio"] > 0


def test_a_stale_certificate_is_not_shown(call: Call, exported: Path, reported: RunReport) -> None:
    parity = exported / "parity.json"
    record = json.loads(parity.read_text())
    stale = {**record, "model_sha256": "0" * 64, "integers_different": 7, "passed": False, "failures": ["stale"]}
    parity.write_text(json.dumps(stale))
    outcome = call("report", exported)
    assert outcome.code == 0, outcome.err
    assert "report.html" in outcome.out and "report.json" in outcome.out
    found = json.loads((exported / "report.json").read_text())["certificate"]
    assert found["integers_different"] == 0 and found["model_sha256"] == record["model_sha256"]
    assert json.loads(parity.read_text())["model_sha256"] == record["model_sha256"]


def test_a_damaged_file_is_reported_as_failed(call: Call, exported: Path, reported: RunReport, tmp_path: Path) -> None:
    """The same weights with another class's bias: other logits, and images that are put elsewhere."""
    proto = onnx.load(exported / "model.onnx")
    bias = next(tensor for tensor in proto.graph.initializer if tensor.name == "fc/bias")
    values = np.roll(numpy_helper.to_array(bias), 1) * 20
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(proto, tmp_path / "damaged.onnx")
    run = Path(shutil.copytree(exported, tmp_path / "run"))
    outcome = call("report", run, tmp_path / "damaged.onnx", "--out", tmp_path / "page.html")
    assert outcome.code == 1 and "Failed: " in outcome.err
    page, found = (tmp_path / "page.html").read_text(), json.loads((tmp_path / "page.json").read_text())
    assert "The check of this file failed" in page and "Exact:" not in page
    assert found["certificate"]["passed"] is False and found["answers"]["disagreements"] > 0
    assert found["accuracy"]["pytorch"] != found["accuracy"]["onnxruntime"]
    shown = found["answers"]["disagreement_pictures"]
    assert all(one["pytorch"]["guess"] != one["onnxruntime"]["guess"] for one in shown) and shown
    assert f"They put {found['answers']['disagreements']} of 360 images into different classes" in page


def test_float_islands_three_channels_and_names_that_are_html(call: Call, tmp_path: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    names = ["<script>alert(1)<", 'a "b" & c']
    for part, count in (("train", 12), ("val", 5)):
        for name in names:
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{index}.png")
    (tmp_path / "net.py").write_text(NET)
    run = tmp_path / "run"
    flags = [
        "--data",
        f"imagefolder:{tmp_path / 'images'}",
        "--model",
        f"{tmp_path / 'net.py'}:make",
        "--device",
        "cpu",
    ]
    assert call("train", *flags, "--fp-epochs", "1", "--epochs", "1", "--out", run).code == 0
    assert "mecdeploy export" in call("report", run).error  # not yet exported
    assert call("export", run).code == 0
    outcome = call("report", run)
    assert outcome.code == 0, outcome.err
    page, found = (run / "report.html").read_text(), json.loads((run / "report.json").read_text())
    (island,) = [layer for layer in found["layers"] if layer["island"]]
    assert "no integer kernel" in island["reason"] and "LayerNormalization" in island["kernel"]
    assert sum(layer["time"] or 0 for layer in found["layers"]) > 0.5  # the rest are onnxruntime's own nodes
    assert island["reads"] and any(island["name"] in layer["reads"] for layer in found["layers"])
    assert "Every integer kernel is exact; 1 float island" in page
    assert found["classes"] == sorted(names) and found["input_shape"] == [3, 16, 16]
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;" in page


def test_what_cannot_be_reported_says_why(call: Call, run: Path, exported: Path, tmp_path: Path) -> None:
    assert "does not exist" in call("report", tmp_path / "absent").error
    assert f"write it with `mecdeploy export {run}`" in call("report", run).error
    assert "ends in .html" in call("report", exported, "--out", tmp_path / "page.pdf").error
    assert "no such folder" in call("report", exported, "--out", tmp_path / "absent" / "page.html").error
    assert "not a readable ONNX file" in call("report", exported, Path(__file__)).error
    assert not list(tmp_path.iterdir())


def test_full_precision_alone_is_refused(call: Call, run: Path, tmp_path: Path) -> None:
    flags = ["--data", "digits", "--method", "fp32", "--fp-epochs", "1", "--device", "cpu"]
    assert call("train", *flags, "--out", tmp_path / "run").code == 0
    assert "holds no quantised network" in call("report", tmp_path / "run").error


def test_a_missing_library_is_named_before_any_work(
    call: Call, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("mecdeploy.run_report.writing.find_spec", lambda n: None if n == "matplotlib" else find(n))
    assert call("report", exported).error == (
        "Error: a report needs matplotlib; install it with `pip install 'mecdeploy[report]'`."
    )


def test_the_commands_write_the_file_again(call: Call, exported: Path, tmp_path: Path) -> None:
    from mecdeploy.run_report.page import commands

    run = Path(shutil.copytree(exported, tmp_path / "run"))
    options = ["--bits", "8", "--target", "portable", "--input", "float"]
    assert call("export", run, *options, "--out", tmp_path / "wide.onnx").code == 0
    found = report(run, tmp_path / "wide.onnx", out=tmp_path / "wide.html").facts
    assert {layer.weights.bits for layer in found.layers if layer.weights is not None} == {8}
    assert f"mecdeploy export {run} {' '.join(options)}\n" in commands(found)
    assert found.certificate.passed and "(trained 4)" in (tmp_path / "wide.html").read_text()
