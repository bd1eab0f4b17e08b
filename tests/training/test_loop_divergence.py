"""A loss that is not finite: stop, say where and which unit, keep what was good."""

import re

import pytest
import torch
from tiny_run import build_tiny, tiny_config, tiny_dataset
from torch import nn

from mecdeploy.training.calibration import calibrate
from mecdeploy.training.checkpoint import read_checkpoint
from mecdeploy.training.config import QuantConfig
from mecdeploy.training.diagnose import first_non_finite
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import StepEvent
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.loop import train
from mecdeploy.training.preparation import prepare

pytestmark = pytest.mark.usefixtures("tiny_models")


def test_a_rate_far_too_high_stops_full_precision(tmp_path):
    steps = []
    with pytest.raises(TrainingError) as stop:
        train(tiny_config(fp_learning_rate=1e30), tiny_dataset(), tmp_path / "run", report=steps.append)
    taken = [e for e in steps if isinstance(e, StepEvent)]
    following = (1, len(taken) + 1)  # the step after the last one that was taken
    assert re.search(
        rf"the loss is (nan|inf) in stage fp32, epoch {following[0]}, step {following[1]} \(task (nan|inf)\): "
        r"the activations of \w+ went non-finite first\. Lower schedule\.fp_learning_rate \(now 1e\+30\)\. "
        r"There is no checkpoint yet\.",
        str(stop.value),
    )
    assert list((tmp_path / "run").iterdir()) == []


def test_diverging_qat_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(TrainingError) as stop:
        train(tiny_config(learning_rate=1e38), tiny_dataset(), tmp_path / "run")
    assert "in stage qat, epoch 1, step" in str(stop.value)
    assert "Lower schedule.learning_rate (now 1e+38)" in str(stop.value)
    assert str(stop.value).endswith("The last good checkpoint is checkpoint-fp32-0002.safetensors.")
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
