"""Distillation from the full-precision network, with labels and without."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import (
    FINAL,
    STEPS,
    TinyNet,
    assert_same_run,
    build_tiny,
    tensors_in,
    tiny_config,
    tiny_dataset,
    tiny_images,
)
from torch import Tensor

from mecdeploy.training.calibration import calibrate
from mecdeploy.training.config import DataConfig, DistillConfig, MecConfig, QuantConfig, ScheduleConfig, TrainConfig
from mecdeploy.training.data import Batch
from mecdeploy.training.data.memory import MemorySource
from mecdeploy.training.distillation import Teacher, distillation_loss
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import AGREEMENT, EpochEvent, StepEvent, TrainingInterrupted
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.loop import train
from mecdeploy.training.preparation import prepare
from mecdeploy.training.run import load_run
from mecdeploy.training.stages import QuantizedTask
from mecdeploy.training.state import State

pytestmark = pytest.mark.usefixtures("tiny_models")

SPEC = InputSpec.from_statistics(channels=1, height=8, width=8, mean=104.3, std=70.1)
CPU = torch.device("cpu")
TEACHER_VIEW = MecConfig(samples=16, experts=2, views="teacher")


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Softmax of each row, as a loop over its definition."""
    rows = []
    for row in logits.astype(np.float64):
        powers = np.array([np.exp(value / temperature - max(row) / temperature) for value in row])
        rows.append(powers / powers.sum())
    return np.array(rows)


# The term


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_the_term_is_the_divergence_times_the_square_of_the_temperature(temperature: float) -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 5, (2, 7, 4))
    p, q = (probabilities(logits, temperature) for logits in (teacher, student))
    expected = (
        temperature**2 * sum(p[m, c] * (np.log(p[m, c]) - np.log(q[m, c])) for m in range(7) for c in range(4)) / 7
    )
    x = torch.tensor(student, requires_grad=True)
    loss = distillation_loss(x, torch.tensor(teacher), temperature)
    loss.backward()  # type: ignore[no-untyped-call]
    # float64 on both sides, some dozen operations: their rounding is 1e-16 each.
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), temperature * (q - p) / 7, rtol=1e-9, atol=1e-14)


def test_certain_networks_have_a_finite_term() -> None:
    far = torch.tensor([[1e4, 0.0, -1e4]])
    assert distillation_loss(far, far, 1.0).item() == 0.0
    # p is (1, 0, 0) and log q is (-2e4, -1e4, 0).
    assert distillation_loss(-far, far, 1.0).item() == 2e4


# The teacher


class Counting(TinyNet):
    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        Counting.passes += 1
        return super().forward(x)


def test_the_teacher_is_the_frozen_network_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    network = build_tiny(None, num_classes=3, channels=1, height=8, width=8)
    pixels = torch.from_numpy(tiny_images(5, seed=3)[0])
    expected = network.eval()(SPEC.normalize(pixels)).detach()
    teacher = Teacher(network.train(), SPEC, device=CPU, features=True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    taught = teacher(pixels)
    # The same float32 sums of some 72 products in another order: the teacher computes channels last.
    torch.testing.assert_close(taught.logits, expected, rtol=0, atol=1e-6)
    assert not taught.logits.requires_grad
    assert torch.equal(teacher.answers(pixels), expected.argmax(1))
    assert Teacher(network, SPEC, device=CPU, features=False)(pixels).features is None


def test_teacher_features_are_what_the_last_linear_reads() -> None:
    torch.manual_seed(0)
    network = TinyNet(3, 1).eval()
    pixels = torch.from_numpy(tiny_images(5, seed=3)[0])
    taught = Teacher(network, SPEC, device=CPU, features=True)(pixels)
    assert taught.features is not None
    assert taught.features.shape == (5, 8) and not taught.features.requires_grad
    with torch.no_grad():
        # The linear layer, written out; float32 sums of 8 products in another order.
        by_hand = (taught.features[:, None, :] * network.fc.weight).sum(2) + network.fc.bias
        torch.testing.assert_close(by_hand, taught.logits, rtol=0, atol=1e-6)


def quantized(network: TinyNet) -> Any:
    model = prepare(network, QuantConfig(), SPEC)
    calibrate(model, [torch.from_numpy(tiny_images(20, seed=4)[0])])
    return model.train()


@pytest.mark.parametrize("views", ["teacher", "augmented", "one"])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_step_asks_the_teacher_once_and_weighs_its_terms(views: str, labelled: bool) -> None:
    torch.manual_seed(0)
    network = Counting(3, 1)
    model = quantized(network)
    mec = MecConfig(samples=16, experts=2, views=views, warmup=0.0)
    task = QuantizedTask(
        model,
        label_smoothing=0.1,
        device=CPU,
        mec=mec,
        distill=DistillConfig(weight=0.25, temperature=2.0),
        teacher=Teacher(network, SPEC, device=CPU, features=views == "teacher"),
        labelled=labelled,
    )
    pixels, labels = tiny_images(24, seed=5)
    images = torch.from_numpy(pixels)
    batch = Batch((images,) if task.views == 1 else (images, images.flip(3)), torch.from_numpy(labels))
    Counting.passes = 0
    seen: list[Tensor] = []
    task.forward = lambda *arguments: (found := model(*arguments), seen.append(found[0]))[0]
    loss = task.loss(batch, fraction=0.5, seed=1)
    assert Counting.passes == 1
    student = seen[0].detach().numpy()
    teacher = network.eval()(SPEC.normalize(torch.cat(batch.images))).detach().numpy()
    p, q = probabilities(teacher, 2.0), probabilities(student, 2.0)
    distill = 4.0 * (p * (np.log(p) - np.log(q))).sum(1).mean()
    expected = distill
    answers = teacher.argmax(1)
    if labelled:
        answers = np.tile(labels, task.views)
        logs = np.log(probabilities(student, 1.0))
        hard = logs[np.arange(len(logs)), answers]
        cross_entropy = -(0.9 * hard + 0.1 * logs.mean(1)).mean()
        assert loss.terms["task"].item() == pytest.approx(cross_entropy, rel=1e-5)
        expected = 0.75 * cross_entropy + 0.25 * distill
    else:
        assert "task" not in loss.terms
    # float32 sums of some hundred terms against float64: 2^-24 each.
    assert loss.terms["distill"].item() == pytest.approx(distill, rel=1e-5)
    assert loss.total.item() == pytest.approx(expected - loss.terms["mec"].item(), rel=1e-5)
    assert loss.correct.item() == (student.argmax(1) == answers).sum() / task.views


# Whole runs


def with_distillation(config: TrainConfig, weight: float = 0.5, **others: Any) -> TrainConfig:
    return dataclasses.replace(config, distill=DistillConfig(weight=weight, **others))


def unlabelled(weights: Path, weight: float = 1.0, **options: Any) -> TrainConfig:
    config = tiny_config(weights=str(weights), fp_epochs=0, **options)
    return dataclasses.replace(
        config, data=DataConfig(labels="none"), distill=DistillConfig(weight=weight, temperature=2.0)
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-precision network that has learnt something."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mecdeploy.training.state.build_model", build_tiny)
        return train(tiny_config(method="fp32", fp_epochs=8), tiny_dataset(), out).checkpoint


def test_a_weight_of_zero_changes_no_bit_and_makes_no_teacher(tmp_path: Path) -> None:
    config = tiny_config()
    train(config, tiny_dataset(), tmp_path / "without")
    train(with_distillation(config, 0.0, temperature=7.0), tiny_dataset(), tmp_path / "zero")
    assert_same_run(tmp_path / "zero", tmp_path / "without")
    state = State(with_distillation(config, 0.0), tiny_dataset(), CPU)
    state.quantize()
    assert state.teacher is None


def test_a_weight_changes_the_run_and_is_told(tmp_path: Path) -> None:
    events: list[Any] = []
    train(tiny_config(method="lsq"), tiny_dataset(), tmp_path / "without")
    train(with_distillation(tiny_config(method="lsq")), tiny_dataset(), tmp_path / "with", report=events.append)
    one, two = (tensors_in(tmp_path / name / FINAL) for name in ("without", "with"))
    assert all(torch.equal(one[name], two[name]) for name in one if name.startswith("float."))
    assert any(not torch.equal(one[name], two[name]) for name in one if name.startswith("model."))
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert all(("distill" in step.terms) == (step.stage != "fp32") for step in steps)
    for step in steps:
        if step.stage != "fp32":
            # The loss is float32, and so were its terms when they were added.
            assert step.loss == pytest.approx(0.5 * step.terms["task"] + 0.5 * step.terms["distill"], rel=1e-5)


def shuffled_dataset() -> Any:
    """The same images under other labels, none of them right; validation as ever."""
    pixels, labels = tiny_images(45, seed=1)
    return tiny_dataset(train=MemorySource(pixels, (labels + 1) % 3, flip=True))


@pytest.mark.parametrize(
    ("weight", "options"),
    [
        (1.0, {"method": "lsq"}),
        (1.0, {"mec": MecConfig(samples=16, experts=2, views="augmented")}),
        (1.0, {"mec": TEACHER_VIEW}),
        (0.0, {"mec": TEACHER_VIEW}),
    ],
)
def test_without_labels_none_is_read(tmp_path: Path, weights: Path, weight: float, options: dict[str, Any]) -> None:
    config = unlabelled(weights, weight, **options)
    events: list[Any] = []
    result = train(config, tiny_dataset(), tmp_path / "right", report=events.append)
    train(config, shuffled_dataset(), tmp_path / "wrong")
    assert_same_run(tmp_path / "wrong", tmp_path / "right")
    epochs = [event for event in events if isinstance(event, EpochEvent)]
    assert all(event.train_measure == AGREEMENT and event.validation_measure == "accuracy" for event in epochs)
    assert all("task" not in event.terms for event in epochs)
    assert result.measure == "accuracy" and result.accuracy_fp32 > 0.5
    assert result.accuracy == share_right(tmp_path / "right", by_teacher=False)


def share_right(out: Path, *, by_teacher: bool) -> float:
    """Of the validation images, one at a time, from the final checkpoint alone."""
    run = load_run(out)
    pixels, labels = tiny_images(24, seed=2)
    right = 0
    for image, label in zip(torch.from_numpy(pixels), labels, strict=True):
        answer = run.model(image[None]).argmax().item()
        teacher = run.float_model(run.spec.normalize(image[None])).argmax().item()
        right += answer == (teacher if by_teacher else label)
    return right / 24


def test_unlabelled_images_are_validated_by_the_teacher(tmp_path: Path, weights: Path) -> None:
    pixels = tiny_images(24, seed=2)[0]
    dataset = tiny_dataset(validation=MemorySource(pixels, np.full(24, -1), flip=False), validation_labelled=False)
    result = train(unlabelled(weights, method="lsq"), dataset, tmp_path / "run")
    assert result.measure == AGREEMENT and result.accuracy_fp32 == 1.0
    assert result.accuracy == share_right(tmp_path / "run", by_teacher=True)
    assert {event.validation_measure for event in result.history} == {AGREEMENT}
    assert load_run(tmp_path / "run").metrics["measure"] == AGREEMENT


def test_interrupted_after_every_single_step(tmp_path: Path, weights: Path) -> None:
    config = unlabelled(weights, mec=TEACHER_VIEW)
    train(config, tiny_dataset(), tmp_path / "whole")

    def one_step(event: object) -> None:
        if isinstance(event, StepEvent):
            raise KeyboardInterrupt

    for session in range(4 * STEPS):
        with pytest.raises(TrainingInterrupted):
            train(config, tiny_dataset(), tmp_path / "run", resume=session > 0, report=one_step)
    train(config, tiny_dataset(), tmp_path / "run", resume=True, report=one_step)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# Refusals


def refusal(**changes: Any) -> str:
    with pytest.raises(TrainingError) as caught:
        TrainConfig(**{"data": DataConfig(labels="none"), **changes})
    return str(caught.value)


def test_without_labels_there_is_a_teacher() -> None:
    qat = tiny_config(fp_epochs=0).schedule
    assert refusal() == (
        "data.labels is none, so that a trained network has to teach; name one in weights (--weights): a checkpoint, a "
        "state dict or published weights."
    )
    assert refusal(weights="t.pth") == (
        "data.labels is none, and the full-precision epochs (schedule.fp_epochs is 30) need labels; set "
        "schedule.fp_epochs = 0 (--fp-epochs 0)."
    )
    assert refusal(weights="t.pth", method="fp32") == (
        "data.labels is none, and method fp32 needs labels; choose mec or lsq, with weights to be quantised."
    )
    nothing = (
        "data.labels is none, and nothing in the loss comes from the teacher; set distill.weight = 1 (--distill 1), or "
        'method = "mec" with mec.views = "teacher".'
    )
    assert refusal(weights="t.pth", schedule=qat) == nothing
    assert refusal(weights="t.pth", schedule=qat, method="lsq", mec=TEACHER_VIEW) == nothing
    weights_alone = MecConfig(views="teacher", code=("weights",))
    assert refusal(weights="t.pth", schedule=qat, mec=weights_alone) == nothing
    assert TrainConfig(weights="t.pth", schedule=qat, data=DataConfig(labels="none"), mec=TEACHER_VIEW)


def test_a_teacher_that_nobody_has_trained_is_refused() -> None:
    untrained = tiny_config(fp_epochs=0)
    for key, changes in (
        ("distill.weight is 0.5", {"distill": DistillConfig(weight=0.5)}),
        ("mec.views is teacher", {"mec": TEACHER_VIEW}),
    ):
        with pytest.raises(TrainingError) as caught:
            dataclasses.replace(untrained, **changes)
        assert str(caught.value) == (
            f"{key}, and the full-precision network that teaches is random: schedule.fp_epochs is 0, and there are no "
            "weights. Name some in weights (--weights), or set schedule.fp_epochs."
        )
        assert dataclasses.replace(untrained, weights="t.pth", **changes)
    assert dataclasses.replace(untrained, method="lsq", mec=TEACHER_VIEW)  # which codes nothing


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("schedule.averaging is 0.9", {"schedule": ScheduleConfig(averaging=0.9)}),
        ("schedule.progressive is [8]", {"schedule": ScheduleConfig(progressive=(8,))}),
        ("quant.damping is 0.1", {"quant": QuantConfig(damping=0.1)}),
        ("quant.freezing is 0.1", {"quant": QuantConfig(freezing=0.1)}),
        ("distill.weight is 0.5", {"distill": DistillConfig(weight=0.5)}),
    ],
)
def test_what_acts_on_quantised_networks_is_refused_where_there_is_none(key: str, changes: dict[str, Any]) -> None:
    with pytest.raises(TrainingError) as caught:
        TrainConfig(method="fp32", **changes)
    assert str(caught.value) == (
        f"{key}, which acts while a network is quantised, and method fp32 quantises none; leave it out, or choose "
        "another method."
    )


def test_values_out_of_range() -> None:
    for section, text in (
        (lambda: DistillConfig(weight=1.5), "distill.weight is 1.5; it must lie between 0 and 1."),
        (lambda: DistillConfig(temperature=0.0), "distill.temperature is 0.0; it must be positive."),
        (lambda: DataConfig(labels="some"), "data.labels is 'some'; choose one of given, none."),
    ):
        with pytest.raises(TrainingError) as caught:
            section()
        assert str(caught.value) == text


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path, weights: Path) -> None:
    dataset = tiny_dataset(class_names=("a", "b", "c", "d"))
    with pytest.raises(TrainingError) as caught:
        train(unlabelled(weights), dataset, tmp_path / "run")
    assert str(caught.value) == (
        f"{weights} classifies 3 classes, the data has 4; with data.labels none the weights have to teach, so use "
        "weights of these classes."
    )


def test_an_older_config_has_no_distillation() -> None:
    described = tiny_config().describe()
    del described["distill"], described["data"]["labels"]
    assert TrainConfig.from_description(described) == tiny_config()
