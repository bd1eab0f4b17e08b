"""`mecdeploy representation` and `mecdeploy hessian`: runs of any method, files, tables and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from calling import Call

import mecdeploy


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may write to."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture(scope="module")
def float_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "fp32"
    schedule = mecdeploy.ScheduleConfig(fp_epochs=1)
    mecdeploy.train(mecdeploy.TrainConfig(method="fp32", device="cpu", schedule=schedule), out)
    return out


def test_representation_of_a_quantised_run(call: Call, own_run: Path) -> None:
    outcome = call("representation", own_run, "--images", 100, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert all(len(line) <= 80 for line in outcome.out.splitlines()[:-1])  # the last is a path
    written = json.loads((own_run / "representation.json").read_text())
    report = mecdeploy.representation(own_run, images=100, device="cpu")
    assert written == json.loads(json.dumps({"checkpoint_sha256": written["checkpoint_sha256"], **report.to_json()}))
    assert (report.images, report.part, report.method) == (100, "validation", "mec")
    assert {use.bits for use in report.activations} == {use.bits for use in report.weights} == {4, 8}
    summary = report.summary()
    assert summary["activation_entropy"] == pytest.approx(
        sum(use.entropy for use in report.activations) / len(report.activations)
    )
    assert 0 < summary["weight_entropy_share"] <= 1
    assert summary["feature_effective_rank"] == report.features.effective_rank
    assert summary["float_feature_effective_rank"] != summary["feature_effective_rank"]
    assert f"{report.features.effective_rank:.2f}" in outcome.out and "layer1.0.conv1" in outcome.out


def test_representation_in_full_precision(call: Call, float_run: Path) -> None:
    assert call("representation", float_run, "--part", "training", "--device", "cpu").code == 0
    written = json.loads((float_run / "representation.json").read_text())
    assert written["activations"] == written["weights"] == [] and written["float_features"] is None
    assert written["images"] == 1024
    assert set(written["summary"]) == {
        f"feature_{name}"
        for name in ("effective_rank", "participation_ratio", "within", "between", "spread_ratio", "coding_rate")
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", "100000"], "images is 100000, but the run has 360 validation images; ask for at most these."),
        (["--images", "1"], "'--images'"),
        (["--part", "test"], "part is 'test'; choose one of validation, training."),
        (["--device", "tpu"], "device is 'tpu'"),
    ],
)
def test_representation_refusals(call: Call, own_run: Path, arguments: list[str], words: str) -> None:
    assert words in call("representation", own_run, *arguments).error
    assert not (own_run / "representation.json").exists()


@pytest.mark.parametrize("command", ["representation", "hessian"])
def test_folders_that_are_no_finished_run(call: Call, own_run: Path, tmp_path: Path, command: str) -> None:
    assert "none does not exist; give the folder" in call(command, tmp_path / "none").error
    (tmp_path / "empty").mkdir()
    assert "has no run.toml, so it is no run folder" in call(command, tmp_path / "empty").error
    (own_run / "checkpoint-final.safetensors").unlink()
    assert "has not finished: it stands after" in call(command, own_run).error
    assert not (own_run / f"{command}.json").exists()


FEW = ["--images", "32", "--probes", "2", "--iterations", "3", "--device", "cpu"]


def test_hessian_of_a_quantised_run(call: Call, own_run: Path) -> None:
    outcome = call("hessian", own_run, *FEW)
    assert outcome.code == 0, outcome.err
    assert all(len(line) <= 80 for line in outcome.out.splitlines()[:-1])  # the last is a path
    content = (own_run / "hessian.json").read_bytes()
    written = json.loads(content)
    report = mecdeploy.hessian(own_run, images=32, probes=2, iterations=3, device="cpu")
    assert (own_run / "hessian.json").read_bytes() == content  # it repeats
    assert isinstance(report, mecdeploy.HessianReport)
    assert written == json.loads(json.dumps({"checkpoint_sha256": written["checkpoint_sha256"], **report.to_json()}))
    assert (report.images, report.seed, report.probes, report.method) == (32, 0, 2, "mec")
    assert report.summary() == {
        "hessian_eigenvalue": report.flatness.raw.eigenvalue,
        "hessian_trace": report.flatness.raw.trace,
        "hessian_normalized_eigenvalue": report.flatness.normalized.eigenvalue,
        "hessian_normalized_trace": report.flatness.normalized.trace,
    }
    assert f"{report.flatness.raw.eigenvalue:.4g}" in outcome.out
    assert f"In {report.flatness.weights:,} weights" in outcome.out and "32 training images" in outcome.out


def test_hessian_in_full_precision_sees_the_same_weights(call: Call, float_run: Path, own_run: Path) -> None:
    assert call("hessian", float_run, *FEW).code == call("hessian", own_run, *FEW).code == 0
    full, quantised = (json.loads((run / "hessian.json").read_text()) for run in (float_run, own_run))
    assert full["method"] == "fp32"
    assert full["flatness"]["weights"] == quantised["flatness"]["weights"]
    assert full["flatness"]["raw"]["eigenvalue"] != quantised["flatness"]["raw"]["eigenvalue"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--images", "100000"], "images is 100000, but the run has 1437 training images; ask for at most these."),
        (["--probes", "1"], "'--probes'"),
        (["--iterations", "0"], "'--iterations'"),
        (["--device", "tpu"], "device is 'tpu'"),
    ],
)
def test_hessian_refusals(call: Call, own_run: Path, arguments: list[str], words: str) -> None:
    assert words in call("hessian", own_run, *arguments).error
    assert not (own_run / "hessian.json").exists()
