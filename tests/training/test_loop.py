"""The run as its caller sees it: stages, events, results, refusals."""

import dataclasses
import itertools
import math

import pytest
import torch
from tiny_run import (
    DEPLOY_EPOCHS,
    FP_EPOCHS,
    QAT_EPOCHS,
    STEPS,
    SlowSource,
    assert_same_tensors,
    tensors_in,
    tiny_config,
    tiny_dataset,
    tiny_images,
)

from mecdeploy.training.config import MecConfig
from mecdeploy.training.data.memory import MemorySource
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import EpochEvent, StageEvent, StepEvent
from mecdeploy.training.loop import train
from mecdeploy.training.run import load_run

EPOCHS = {"fp32": FP_EPOCHS, "qat": QAT_EPOCHS, "deploy": DEPLOY_EPOCHS}


pytestmark = pytest.mark.usefixtures("tiny_models")


def test_reports_every_stage_epoch_and_step_in_order(tmp_path):
    events = []
    train(tiny_config(), tiny_dataset(), tmp_path / "run", report=events.append)
    expected = []
    for stage, epochs in EPOCHS.items():
        if stage == "qat":
            expected.append(("StageEvent", "calibrate", 0, 0))
        expected.append(("StageEvent", stage, 0, 0))
        for epoch in range(1, epochs + 1):
            expected += [("StepEvent", stage, epoch, step) for step in range(1, STEPS + 1)]
            expected.append(("EpochEvent", stage, epoch, 0))
    seen = [(type(e).__name__, e.stage, e.epoch, getattr(e, "step", 0)) for e in events]
    assert seen == expected
    stages = [e for e in events if isinstance(e, StageEvent)]
    assert all(e.stages == ("fp32", "calibrate", "qat", "deploy") for e in stages)
    assert [(e.epochs, e.steps) for e in stages] == [(2, 3), (0, 0), (2, 3), (2, 3)]
    assert [e.parameters for e in stages[:2]] == [8 * 9 + 8 * 8 * 9 + 4 * 8 + 8 * 3 + 3] * 2
    assert stages[2].parameters > stages[0].parameters  # step sizes are trained too
    assert all(e.epochs == EPOCHS[e.stage] for e in events if isinstance(e, StepEvent | EpochEvent))


def test_epoch_means_are_those_of_its_steps(tmp_path):
    events = []
    train(tiny_config(), tiny_dataset(), tmp_path / "run", report=events.append)
    for epoch in (e for e in events if isinstance(e, EpochEvent)):
        steps = [e for e in events if isinstance(e, StepEvent) and (e.stage, e.epoch) == (epoch.stage, epoch.epoch)]
        # All batches have 13 images: the mean over images is the mean over steps, up to the order of float64 sums.
        assert epoch.loss == pytest.approx(sum(e.loss for e in steps) / STEPS, rel=1e-12)
        for name, value in epoch.terms.items():
            assert value == pytest.approx(sum(e.terms[name] for e in steps) / STEPS, rel=1e-12)
        assert epoch.learning_rate == steps[-1].learning_rate
        assert epoch.train_accuracy * 13 * STEPS == pytest.approx(round(epoch.train_accuracy * 13 * STEPS), abs=1e-9)


def test_loss_is_task_minus_objective(tmp_path):
    events = []
    train(tiny_config(mec=MecConfig(samples=16, warmup=0.0)), tiny_dataset(), tmp_path / "run", report=events.append)
    quantized = [e for e in events if isinstance(e, StepEvent) and e.stage != "fp32"]
    for event in quantized:
        assert event.terms["mec"] > 0
        # A float32 difference of two float32 numbers near 1.
        assert event.loss == pytest.approx(event.terms["task"] - event.terms["mec"], abs=1e-6)
    assert all(e.loss == e.terms["task"] for e in events if isinstance(e, StepEvent) and e.stage == "fp32")


def test_lsq_trains_without_the_objective_and_differently(tmp_path):
    events = []
    train(tiny_config(method="lsq"), tiny_dataset(), tmp_path / "lsq", report=events.append)
    assert all(set(e.terms) == {"task"} for e in events if isinstance(e, StepEvent))
    train(tiny_config(method="mec"), tiny_dataset(), tmp_path / "mec")
    lsq, mec = (tensors_in(tmp_path / name / "checkpoint-final.safetensors") for name in ("lsq", "mec"))
    assert all(torch.equal(lsq[name], mec[name]) for name in lsq if name.startswith("float."))
    assert not torch.equal(lsq["model.body.conv2.weight"], mec["model.body.conv2.weight"])


def test_fp32_stops_after_full_precision(tmp_path):
    events = []
    result = train(tiny_config(method="fp32"), tiny_dataset(), tmp_path / "run", report=events.append)
    assert {e.stage for e in events} == {"fp32"}
    assert result.accuracy == result.accuracy_fp32 == result.history[-1].validation_accuracy
    with pytest.raises(TrainingError, match="method fp32, so it holds no quantised network.*weights"):
        load_run(tmp_path / "run")


def test_the_result_is_that_of_the_deployed_network(tmp_path):
    dataset = tiny_dataset()
    result = train(tiny_config(fp_epochs=8), dataset, tmp_path / "run")
    images, labels = dataset.validation.arrays()
    run = load_run(tmp_path / "run")
    logits = run.model.integers(torch.from_numpy(images))["logits"]
    assert result.accuracy == run.metrics["accuracy_quantized"] == (logits.argmax(1) == labels).mean()
    with torch.no_grad():
        predicted = run.float_model(run.spec.normalize(torch.from_numpy(images))).argmax(1).numpy()
    assert result.accuracy_fp32 == run.metrics["accuracy_fp32"] == (predicted == labels).mean()
    assert result.accuracy_fp32 > 0.6  # chance is 1/3: the loop does learn


def test_learning_rate_is_one_cosine_over_qat_and_deploy(tmp_path):
    events = []
    train(tiny_config(epochs=20, frozen_epochs=5), tiny_dataset(), tmp_path / "run", report=events.append)
    rates = [e.learning_rate for e in events if isinstance(e, StepEvent) and e.stage != "fp32"]
    peak = rates.index(max(rates))
    assert len(rates) == 60 and peak == 3  # 5% of the steps warm up
    assert all(a < b for a, b in itertools.pairwise(rates[: peak + 1]))
    assert all(a > b for a, b in itertools.pairwise(rates[peak:]))
    assert rates[peak] == 0.02
    # Halfway down the cosine, 28.5 of 57 steps after the peak, between two steps: its slope is all but straight there.
    assert (rates[31] + rates[32]) / 2 == pytest.approx(0.01, rel=1e-9)
    assert 0 < rates[-1] < 1e-4


@pytest.mark.parametrize("views", ["one", "augmented", "teacher"])
def test_same_seed_same_bits(tmp_path, views):
    config = tiny_config(mec=MecConfig(samples=16, views=views, code=("features", "activations", "weights")))
    for name in ("a", "b"):
        torch.manual_seed(hash(name) % 1000)  # what the caller drew before must not matter
        train(config, tiny_dataset(), tmp_path / name)
    assert_same_tensors(*(tmp_path / name / "checkpoint-final.safetensors" for name in ("a", "b")))


def test_another_seed_gives_other_weights(tmp_path):
    for seed in (0, 1):
        train(tiny_config(seed=seed, method="fp32", fp_epochs=1), tiny_dataset(), tmp_path / str(seed))
    a, b = (tensors_in(tmp_path / str(seed) / "checkpoint-final.safetensors") for seed in (0, 1))
    assert not torch.equal(a["float.conv2.weight"], b["float.conv2.weight"])


def test_no_epochs_is_calibration_alone(tmp_path):
    events = []
    config = tiny_config(fp_epochs=8, epochs=0, frozen_epochs=0)
    result = train(config, tiny_dataset(), tmp_path / "run", report=events.append)
    assert [e.stage for e in events if isinstance(e, StageEvent)] == ["fp32", "calibrate"]
    run = load_run(tmp_path / "run")
    assert result.accuracy == run.metrics["accuracy_quantized"]
    # Weights are as the full-precision stage left them, up to the sign that prepare takes out of a negative gamma.
    assert torch.equal(run.model.unit("conv2").weight.abs(), run.float_model.conv2.weight.abs())


def test_a_batch_larger_than_the_data_is_one_step(tmp_path):
    events = []
    train(tiny_config(batch_size=500), tiny_dataset(), tmp_path / "run", report=events.append)
    assert {e.steps for e in events if isinstance(e, StepEvent)} == {1}


def test_throughput_counts_labelled_images_over_time_with_loading(tmp_path):
    source = SlowSource(*tiny_images(45, seed=1), flip=True)
    source.pause = 0.03
    config = tiny_config(mec=MecConfig(samples=16, views="augmented"))
    events = []
    train(config, tiny_dataset(train=source), tmp_path / "run", report=events.append)
    rates = [e.images_per_second for e in events if isinstance(e, StepEvent | EpochEvent)]
    # 13 labelled images (26 augmented ones) in no less than 0.03 s.
    assert 0 < max(rates) <= 13 / 0.03


def test_throughput_leaves_validation_out(tmp_path):
    source = SlowSource(*tiny_images(24, seed=2), flip=False)
    source.pause = 0.5
    events = []
    config = tiny_config(method="fp32", fp_epochs=1)
    train(config, tiny_dataset(validation=source), tmp_path / "run", report=events.append)
    # Three steps of a network of 800 weights take milliseconds; half a second is validation's pause alone.
    assert events[-1].seconds < 0.5


def test_leaves_no_trace_in_the_process(tmp_path):
    import signal

    def settings():
        return (
            torch.get_rng_state().tolist(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            signal.getsignal(signal.SIGINT),
            signal.getsignal(signal.SIGTERM),
            torch.is_grad_enabled(),
        )

    before = settings()
    train(tiny_config(), tiny_dataset(), tmp_path / "run")
    assert settings() == before
    with pytest.raises(TrainingError):
        train(tiny_config(fp_learning_rate=1e30), tiny_dataset(), tmp_path / "nan")
    assert settings() == before


def test_refuses_cuda_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = dataclasses.replace(tiny_config(), device="cuda")
    with pytest.raises(TrainingError, match="device is cuda, but .* Use device auto or cpu"):
        train(config, tiny_dataset(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_refuses_a_folder_that_holds_a_run(tmp_path):
    train(tiny_config(method="fp32", fp_epochs=1), tiny_dataset(), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(TrainingError, match="already holds a run; resume it, or choose another folder"):
        train(tiny_config(), tiny_dataset(), tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_refuses_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match="cannot be written .*choose another"):
        train(tiny_config(), tiny_dataset(), tmp_path / "file" / "run")


def test_refuses_a_single_image(tmp_path):
    dataset = tiny_dataset(train=MemorySource(*tiny_images(1, seed=1), flip=True))
    with pytest.raises(TrainingError, match="digits has 1 training and 24 validation images"):
        train(tiny_config(), dataset, tmp_path / "run")


def test_loss_terms_are_finite_numbers(tmp_path):
    events = []
    config = tiny_config(mec=MecConfig(samples=16, code=("features", "activations", "weights"), form="exact"))
    train(config, tiny_dataset(), tmp_path / "run", report=events.append)
    last = [e for e in events if isinstance(e, StepEvent)][-1]
    assert {"task", "mec", "features", "activations", "weights"} <= set(last.terms)
    assert all(math.isfinite(value) for value in last.terms.values())
