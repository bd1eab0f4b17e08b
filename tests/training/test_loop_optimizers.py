"""The optimiser's groups, the learning rate, and momentum that survives a checkpoint."""

import math

import pytest
import torch
from tiny_run import (
    FINAL,
    assert_same_run,
    build_tiny,
    interrupt_at,
    is_step,
    tensors_in,
    tiny_config,
    tiny_dataset,
)
from torch import nn

from mecdeploy.training.calibration import calibrate
from mecdeploy.training.config import QuantConfig, ScheduleConfig
from mecdeploy.training.events import TrainingInterrupted
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.loop import train
from mecdeploy.training.optimizers import (
    GuardedSGD,
    build_optimizer,
    learning_rate,
    momentum_tensors,
    restore_momentum,
    set_learning_rate,
)
from mecdeploy.training.preparation import prepare

SCHEDULE = ScheduleConfig(momentum=0.5, weight_decay=0.25)


def tiny():
    torch.manual_seed(0)
    return build_tiny(None, num_classes=3, channels=1, height=8, width=8)


def decay_of(optimizer):
    return {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def test_only_weights_decay():
    model = tiny()
    decay = decay_of(build_optimizer(model, SCHEDULE))
    found = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    weights = {"conv1.weight", "conv2.weight", "fc.weight"}
    assert found == {name: 0.25 if name in weights else 0.0 for name in found}


def test_step_sizes_are_a_group_of_their_own_without_decay():
    spec = InputSpec(channels=1, height=8, width=8, pixel_scale=0.01, pixel_zero_point=128)
    model = prepare(tiny(), QuantConfig(), spec)
    calibrate(model, [torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)])
    optimizer = build_optimizer(model, SCHEDULE, model.step_sizes())
    steps = {id(step) for step in model.step_sizes()}
    (group,) = (g for g in optimizer.param_groups if id(g["params"][0]) in steps)
    assert {id(p) for p in group["params"]} == steps and group["weight_decay"] == 0.0
    everything = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_step_sizes_learn_at_a_rate_of_their_own(share):
    """By hand, in exact binary fractions: one update without momentum moves by the rate times the gradient."""
    spec = InputSpec(channels=1, height=8, width=8, pixel_scale=0.01, pixel_zero_point=128)
    model = prepare(tiny(), QuantConfig(), spec)
    schedule = ScheduleConfig(momentum=0.0, weight_decay=0.0, step_rate=share)
    optimizer = build_optimizer(model, schedule, model.step_sizes())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    set_learning_rate(optimizer, 0.5)
    optimizer.step()
    steps = {id(step) for step in model.step_sizes()}
    for name, parameter in model.named_parameters():
        rate = 0.5 * share if id(parameter) in steps else 0.5
        assert torch.equal(parameter, before[name] - rate * 0.25), name


def test_a_run_with_a_step_rate_differs_in_its_steps_and_resumes_to_the_bit(tmp_path, uninterrupted, tiny_models):
    config = tiny_config(step_rate=0.0)
    train(config, tiny_dataset(), tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        train(config, tiny_dataset(), tmp_path / "run", report=interrupt_at(is_step("qat", 2, 2)))
    train(config, tiny_dataset(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    first, last = (tensors_in(tmp_path / "whole" / name) for name in ("checkpoint-qat-0002.safetensors", FINAL))
    steps = [name for name in first if name.startswith("model.") and name.endswith(".step")]
    assert steps and all(torch.equal(first[name], last[name]) for name in steps)  # as they were calibrated
    learned = tensors_in(uninterrupted / FINAL)
    assert not any(torch.equal(learned[name], last[name]) for name in steps)


def test_one_update_by_hand():
    """v = momentum * v + g + decay * w; w -= rate * v, as torch.optim.SGD documents, in exact binary fractions."""
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(1.0)
    optimizer = build_optimizer(layer, SCHEDULE)
    set_learning_rate(optimizer, 0.5)
    weight, bias, velocity_w, velocity_b = 1.0, 1.0, 0.0, 0.0
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        velocity_w = 0.5 * velocity_w + 1.0 + 0.25 * weight
        velocity_b = 0.5 * velocity_b + 1.0
        weight, bias = weight - 0.5 * velocity_w, bias - 0.5 * velocity_b
        assert (layer.weight.item(), layer.bias.item()) == (weight, bias)


@pytest.mark.parametrize("steps", [1, 2, 10, 40, 1000])
def test_learning_rate_against_its_definition(steps):
    warmup = round(steps / 20)
    rates = [learning_rate(0.8, step, steps) for step in range(steps)]
    for step, rate in enumerate(rates):
        if step < warmup:
            assert rate == pytest.approx(0.8 * (step + 1) / (warmup + 1), rel=1e-15)
        else:
            angle = math.pi / 2 * (step - warmup) / (steps - warmup)
            # The half cosine in another form, float64 rounding apart.
            assert rate == pytest.approx(0.8 * math.cos(angle) ** 2, rel=1e-9)
    assert max(rates) == 0.8 and min(rates) > 0


def test_momentum_goes_out_and_comes_back_by_name():
    model, inputs = tiny(), torch.randn(4, 1, 8, 8)

    def step(network, optimizer):
        torch.manual_seed(1)
        optimizer.zero_grad()
        network(inputs).square().sum().backward()
        set_learning_rate(optimizer, 0.01)
        optimizer.step()

    optimizer = build_optimizer(model, SCHEDULE)
    assert momentum_tensors(optimizer, model) == {}
    step(model, optimizer)
    saved = {name: tensor.clone() for name, tensor in momentum_tensors(optimizer, model).items()}
    assert saved.keys() == dict(model.named_parameters()).keys()
    twin = tiny()
    twin.load_state_dict(model.state_dict())
    other = build_optimizer(twin, SCHEDULE)
    restore_momentum(other, twin, saved)
    step(model, optimizer)
    step(twin, other)
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def guarded(values, momentum=0.5):
    step = nn.Parameter(torch.tensor(values))
    return step, GuardedSGD([{"params": [step], "step_sizes": True}], lr=1.0, momentum=momentum)


def update(optimizer, step, gradient):
    step.grad = torch.tensor(gradient)
    optimizer.step()
    return step.tolist()


def test_an_update_leaves_half_of_a_step_size_and_forgets_what_overshot():
    """By hand, in exact binary fractions: v = v / 2 + g; s -= v, at least s / 2, and then v = 0."""
    step, optimizer = guarded([1.0, 1.0, 1.0])
    assert update(optimizer, step, [0.25, 0.5, 0.75]) == [0.75, 0.5, 0.5]
    velocity = optimizer.state[step]["momentum_buffer"]
    assert velocity.tolist() == [0.25, 0.5, 0.0]  # exactly half is no overshooting
    assert update(optimizer, step, [0.0, 4.0, 0.125]) == [0.625, 0.25, 0.375]
    assert velocity.tolist() == [0.125, 0.0, 0.125]
    assert update(optimizer, step, [-8.0, 0.0, 100.0]) == [0.625 + 7.9375, 0.25, 0.1875]  # upwards is free


def test_no_number_of_updates_reaches_zero():
    step, optimizer = guarded([1.0], momentum=0.9)
    for _ in range(20):
        update(optimizer, step, [1e30])
    assert step.item() == 2.0**-20


def test_a_step_size_that_was_negative_comes_back():
    """Of a checkpoint from before there was a guard."""
    step, optimizer = guarded([-1.0])
    assert update(optimizer, step, [4.0]) == [-0.5]
    assert update(optimizer, step, [-2.0]) == [1.5]


def test_no_guard_hides_what_is_not_finite():
    step, optimizer = guarded([1.0])
    assert math.isnan(update(optimizer, step, [float("nan")])[0])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_where_nothing_overshoots_it_is_sgd_bit_for_bit(momentum):
    torch.manual_seed(0)
    start, gradients = torch.rand(50) + 0.5, 0.01 * torch.randn(9, 50)
    step, optimizer = guarded(start.tolist(), momentum)
    twin = nn.Parameter(start.clone())
    plain = torch.optim.SGD([twin], lr=1.0, momentum=momentum)
    for gradient in gradients:
        update(optimizer, step, gradient.tolist())
        twin.grad = gradient.clone()
        plain.step()
        assert torch.equal(step, twin)


def test_a_step_size_without_a_gradient_stays_and_others_are_guarded():
    idle, busy = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor([1.0]))
    optimizer = GuardedSGD([{"params": [idle, busy], "step_sizes": True}], lr=1.0, momentum=0.5)
    assert update(optimizer, busy, [5.0]) == [0.5] and idle.item() == 3.0
    assert optimizer.state[busy]["momentum_buffer"].tolist() == [0.0]


def test_only_step_sizes_are_guarded():
    spec = InputSpec(channels=1, height=8, width=8, pixel_scale=0.01, pixel_zero_point=128)
    model = prepare(tiny(), QuantConfig(zero_point="learned"), spec)
    optimizer = build_optimizer(model, SCHEDULE, model.step_sizes())
    marked = {id(p) for group in optimizer.param_groups if group["step_sizes"] for p in group["params"]}
    assert marked == {id(step) for step in model.step_sizes()}  # a learned offset may have either sign
