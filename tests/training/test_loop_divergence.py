"""A loss that is not finite: stop, say where and which unit, keep what was good."""

import re
from dataclasses import replace

import pytest
import torch
from tiny_run import build_tiny, is_step, tiny_config, tiny_dataset, tiny_images
from torch import nn

from mecdeploy.training.calibration import calibrate
from mecdeploy.training.checkpoint import read_checkpoint
from mecdeploy.training.config import QuantConfig
from mecdeploy.training.data.memory import MemorySource
from mecdeploy.training.diagnose import constant_outputs, first_non_finite
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import EpochEvent, StepEvent
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.interrupt import Interrupts
from mecdeploy.training.loop import train
from mecdeploy.training.preparation import prepare
from mecdeploy.training.retention import CheckpointFolder
from mecdeploy.training.seeding import derive_seed
from mecdeploy.training.session import Session
from mecdeploy.training.state import State

pytestmark = pytest.mark.usefixtures("tiny_models")


def test_a_rate_far_too_high_stops_full_precision(tmp_path):
    steps = []
    with pytest.raises(TrainingError) as stop:
        train(tiny_config(fp_learning_rate=1e30), tiny_dataset(), tmp_path / "run", report=steps.append)
    taken = [e for e in steps if isinstance(e, StepEvent)]
    following = (1, len(taken) + 1)  # the step after the last one that was taken
    assert re.search(
        rf"the loss is (nan|inf) in stage fp32, epoch {following[0]}, step {following[1]} \(task (nan|inf)\): "
        r"the activations of \w+ went non-finite first(; \S+ went first, \S+ times its start at epoch 1, step \d)?\. "
        r"There is no checkpoint yet\. Resumed, it would fail again: start another run with a lower "
        r"schedule\.fp_learning_rate \(now 1e\+30\)\.$",
        str(stop.value),
    )
    assert list((tmp_path / "run").iterdir()) == []


def test_diverging_qat_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(TrainingError) as stop:
        train(tiny_config(learning_rate=1e38), tiny_dataset(), tmp_path / "run")
    assert "in stage qat, epoch 1, step" in str(stop.value)
    good = tmp_path / "run" / "checkpoint-fp32-0002.safetensors"
    assert str(stop.value).endswith(
        f"The last good checkpoint is {good.name}. Resumed, it would fail again: start another run with a lower "
        f"schedule.learning_rate (now 1e+38) and, to keep its full-precision weights, weights = '{good}', "
        "schedule.fp_epochs = 0."
    )
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["checkpoint-fp32-0001.safetensors", "checkpoint-fp32-0002.safetensors"]
    for name in names:
        assert all(torch.isfinite(t).all() for t in read_checkpoint(tmp_path / "run" / name).tensors.values())


def test_weights_that_break_in_the_last_step_of_an_epoch_are_not_saved(tmp_path, monkeypatch):
    """No later step would notice: the check before writing does."""
    from mecdeploy.training import session

    def poison(optimizer, rate):
        if rate == 0.0:
            optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))
        optimizer.param_groups[0]["lr"] = 0.1

    rates = iter([0.1] * 5 + [0.0] + [0.1] * 99)  # poisoned: the third step of the second epoch
    monkeypatch.setattr(session, "set_learning_rate", lambda optimizer, _: poison(optimizer, next(rates)))
    with pytest.raises(TrainingError, match=r"conv1\.weight is not finite; checkpoint-fp32-0002.* was not written"):
        train(tiny_config(), tiny_dataset(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-fp32-0001.safetensors"]


def chain():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))


def test_names_a_parameter_before_an_activation():
    net = chain()
    with torch.no_grad():
        net[1].weight[0, 0] = float("nan")
    assert first_non_finite(net, lambda: net(torch.ones(1, 2))) == "the parameter 1.weight is not finite"


def test_names_the_first_layer_whose_output_overflows():
    net = chain()
    with torch.no_grad():
        net[0].weight.fill_(1e20)
        net[1].weight.fill_(1e20)  # 1e20 * 1e20 is beyond float32, though no weight is
    assert first_non_finite(net, lambda: net(torch.ones(1, 2))) == "the activations of 1 went non-finite first"


def test_names_a_spoiled_statistic():
    net = nn.Sequential(nn.BatchNorm1d(2))
    net[0].running_var[0] = float("inf")
    assert first_non_finite(net, lambda: net(torch.ones(2, 2))) == "the buffer 0.running_var is not finite"


def test_says_so_when_all_is_finite():
    net = chain()
    clause = first_non_finite(net, lambda: net(torch.ones(1, 2)))
    assert clause == "every weight, step size and activation of this batch is finite"
    assert all(not module._forward_hooks for module in net.modules())


def quantized():
    torch.manual_seed(0)
    spec = InputSpec(channels=1, height=8, width=8, pixel_scale=0.01, pixel_zero_point=128)
    model = prepare(build_tiny(None, num_classes=3, channels=1, height=8, width=8), QuantConfig(), spec)
    pixels = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    calibrate(model, [pixels])
    return model, pixels


def test_names_a_units_step_size():
    model, pixels = quantized()
    with torch.no_grad():
        model.unit("conv2").output.step.fill_(float("nan"))
        model.unit("conv1").weight[0] = float("nan")  # a step size comes first: it is the usual cause
    clause = first_non_finite(model, lambda: model(pixels))
    assert clause == "the step size conv2.outputs.0.step is not finite"


def test_names_a_unit_whose_activations_overflow():
    model, pixels = quantized()
    with torch.no_grad():
        model.unit("pool").output.step.fill_(10.0)
        model.unit("fc").weight_quantizer.step.fill_(3e38)  # their product is beyond float32, though neither is
    assert first_non_finite(model, lambda: model(pixels)) == "the activations of fc went non-finite first"


def test_names_units_that_make_one_code_of_everything():
    model, pixels = quantized()
    assert constant_outputs(model, lambda: model(pixels)) == []
    with torch.no_grad():
        model.unit("pool").output.step.fill_(1e6)
    assert constant_outputs(model, lambda: model(pixels)) == ["pool"]
    assert constant_outputs(chain(), lambda: None) == []


def test_a_loss_that_is_finite_and_hopeless_stops_before_it_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("mecdeploy.training.watch.WINDOW", 5)
    monkeypatch.setattr("mecdeploy.training.watch.FIRST", 2)
    events = []

    def report(event):
        events.append(event)
        if is_step("qat", 2, 1)(event):
            with torch.no_grad():
                model = session.state.model
                model.unit("fc").bias[0] = 60.0  # confidently wrong about two of three
                model.unit("conv2").weight_quantizer.step[4] *= 1e6

    session = captured_session(tmp_path / "run", report)
    with pytest.raises(TrainingError) as stop:
        session.run()
    good = tmp_path / "run" / "checkpoint-qat-0001.safetensors"
    assert re.match(
        r"training diverged in stage qat, epoch 2, step 3: the mean task loss of the last 5 steps is \S+, at the "
        r"beginning it was \S+; 4\.61 is twice that of guessing; conv2's weight step size \(channel 4\) went first, "
        r"\S+ times its start at epoch 2, step 3\. The last good checkpoint is checkpoint-qat-0001\.safetensors\. "
        r"Resumed, it would fail again: start another run with a lower schedule\.learning_rate \(now 0\.02\) and, to "
        rf"keep its full-precision weights, weights = '{re.escape(str(good))}', schedule\.fp_epochs = 0\.$",
        str(stop.value),
    ), str(stop.value)
    last = [event for event in events if isinstance(event, EpochEvent)][-1]
    assert (last.stage, last.epoch) == ("qat", 1)  # the epoch that failed is neither reported nor saved
    assert not (tmp_path / "run" / "checkpoint-qat-0002.safetensors").exists()
    train(tiny_config(weights=str(good), fp_epochs=0), tiny_dataset(), tmp_path / "again")  # as the message says


def test_a_poisoned_batch_is_told_from_poisoned_weights(tmp_path):
    class Poisoned(MemorySource):
        """In the second step of stage qat no image has a label, and the mean of no losses is not a number."""

        def batches(self, *args, **kwargs):
            for index, batch in enumerate(super().batches(*args, **kwargs)):
                poisoned = kwargs.get("seed") == derive_seed(0, "qat") and index == 1
                yield replace(batch, labels=torch.full_like(batch.labels, -100)) if poisoned else batch

    source = Poisoned(*tiny_images(45, seed=1), flip=True)
    with pytest.raises(TrainingError) as stop:
        train(tiny_config(), tiny_dataset(train=source), tmp_path / "run")
    assert re.match(
        r"the loss is nan in stage qat, epoch 1, step 2 \(task nan, .*\): every weight, step size and activation of "
        r"this batch is finite\. The last good checkpoint is checkpoint-fp32-0002\.safetensors\.",
        str(stop.value),
    ), str(stop.value)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_step_size_is_named_with_where_it_stopped(tmp_path, poison):
    events = []

    def report(event):
        events.append(event)
        if is_step("qat", 2, 1)(event):
            with torch.no_grad():
                model = session.state.model
                model.unit("conv2").weight_quantizer.step[4] = poison

    session = captured_session(tmp_path / "run", report)
    with pytest.raises(TrainingError) as stop:
        session.run()
    assert re.match(
        r"the loss is nan in stage qat, epoch 2, step 2 \(.*\): the step size conv2\.weight_quantizer\.step is not "
        r"finite; conv2's weight step size \(channel 4\) went first, (nan|inf) times its start at epoch 2, step 2\. "
        r"The last good checkpoint is checkpoint-qat-0001\.safetensors\.",
        str(stop.value),
    ), str(stop.value)


def captured_session(out, report):
    """A run whose state the test can reach."""
    config = tiny_config()
    folder = CheckpointFolder(out)
    folder.make_writable()
    state = State(config, tiny_dataset(), torch.device("cpu"))
    return Session(state, folder, report, Interrupts())


@pytest.mark.parametrize(
    "schedule",
    [
        {"label_smoothing": 0.9},
        {"batch_size": 500, "epochs": 16},  # one step an epoch
        {"learning_rate": 1e-9},  # nothing falls, nothing diverges
        {"learning_rate": 0.5},
    ],
)
def test_healthy_runs_are_left_alone(tmp_path, monkeypatch, schedule):
    monkeypatch.setattr("mecdeploy.training.watch.WINDOW", 10)  # ten times as quick to judge as it is
    result = train(tiny_config(**{"epochs": 8, **schedule}), tiny_dataset(), tmp_path / "run")
    assert result.history[-1].stage == "deploy"
