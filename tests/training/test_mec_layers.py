"""mec.layers: whose activations and weights are coded, and what of it is refused before anything is trained."""

import pytest
import torch
from test_quantized_model import calibrated
from tiny_networks import images
from tiny_run import interrupt_at, is_step, tensors_in, tiny_config, tiny_dataset

from mecdeploy.training.coded_layers import coded_layers
from mecdeploy.training.config import MecConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import EpochEvent, TrainingInterrupted
from mecdeploy.training.loop import train

ALL = ("features", "activations", "weights")


def test_patterns_choose_units_in_execution_order() -> None:
    model = calibrated()
    assert coded_layers(model, MecConfig()) == ()
    assert coded_layers(model, MecConfig(code=ALL, layers=("hid*", "add*", "first"))) == (
        "first",
        "add",
        "add_2",
        "hidden",
    )


def test_only_chosen_units_are_recorded_and_features_whatever_is_chosen() -> None:
    model = calibrated().train()
    torch.manual_seed(0)
    logits, whole = model(images(4), ALL)
    torch.manual_seed(0)
    same, chosen = model(images(4), ALL, ("add", "second"))
    assert torch.equal(logits, same)
    assert set(chosen.activations) == {"add/skip", "add/act", "second"}
    assert list(chosen.weights) == ["second"]
    for name, tensor in chosen.activations.items():
        assert torch.equal(tensor, whole.activations[name])
    assert torch.equal(chosen.weights["second"], whole.weights["second"])
    assert chosen.features is not None and whole.features is not None
    assert torch.equal(chosen.features, whole.features)


@pytest.mark.parametrize(
    ("layers", "code", "message"),
    [
        (("convv1",), ("weights",), "mec.layers: 'convv1' matches no unit. Did you mean 'conv1'?"),
        (("conv*", "zzz"), ("weights",), "mec.layers: 'zzz' matches no unit. Units are: conv1, conv2, add, "),
        (("add",), ("weights",), "mec.code asks for weights, and mec.layers leaves add, which has none; take weights"),
        (("fc",), ("activations",), "mec.code asks for activations, and mec.layers leaves fc, which has none; take"),
    ],
)
@pytest.mark.usefixtures("tiny_models")
def test_what_matches_nothing_is_refused_before_training(tmp_path, layers, code, message) -> None:
    events = []
    config = tiny_config(mec=MecConfig(layers=layers, code=code))
    with pytest.raises(TrainingError) as refused:
        train(config, tiny_dataset(), tmp_path / "run", report=events.append)
    assert message in str(refused.value) and events == []


def test_layers_without_a_kind_that_has_them_are_refused() -> None:
    with pytest.raises(TrainingError, match="mec.layers chooses among activations and weights, and mec.code asks for "):
        MecConfig(layers=("conv1",))


def test_a_fall_that_begins_before_the_rise_has_ended_is_refused() -> None:
    assert MecConfig(warmup=0.3, decay=0.7).decay == 0.7
    assert MecConfig(warmup=2.0).decay == 0.0  # a rise that never ends was always allowed
    with pytest.raises(TrainingError, match="mec.warmup is 0.4 and mec.decay 0.7: beta would fall before it has risen"):
        MecConfig(warmup=0.4, decay=0.7)
    with pytest.raises(TrainingError, match="mec.decay is -0.1; it must be at least 0"):
        MecConfig(decay=-0.1)


@pytest.mark.usefixtures("tiny_models")
def test_a_run_with_both_follows_its_ramp_and_resumes_to_the_bit(tmp_path) -> None:
    mec = MecConfig(samples=16, experts=2, code=ALL, layers=("conv2", "add"), beta=0.5, warmup=0.0, decay=0.5)
    events = []
    train(tiny_config(mec=mec), tiny_dataset(), tmp_path / "whole", report=events.append)
    betas = [e.terms["beta"] for e in events if isinstance(e, EpochEvent) and e.stage != "fp32"]
    # Steps 0..11 of 12, 3 an epoch; from step 6 on beta is 0.5 * (1 - step / 12) / 0.5.
    means = [sum(min(0.5, 1 - step / 12) for step in range(first, first + 3)) / 3 for first in (0, 3, 6, 9)]
    assert betas == pytest.approx(means, rel=1e-6)  # beta passes through float32
    for session, where in enumerate([("qat", 1, 2), ("deploy", 1, 1)]):
        with pytest.raises(TrainingInterrupted):
            train(
                tiny_config(mec=mec),
                tiny_dataset(),
                tmp_path / "run",
                resume=session > 0,
                report=interrupt_at(is_step(*where)),
            )
    train(tiny_config(mec=mec), tiny_dataset(), tmp_path / "run", resume=True)
    whole, again = (tensors_in(tmp_path / name / "checkpoint-final.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
