"""A whole quantised model: its integers, its two modes, what it records and what it saves."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import kernel_witness as witness
import numpy as np
import pytest
import torch
from tiny_networks import SPEC, images, tiny_residual
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training.calibration import calibrate
from mecdeploy.training.config import CODED_TENSORS, QuantConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.preparation import prepare
from mecdeploy.training.quantizers import ActivationQuantizer
from mecdeploy.training.units import WeightedUnit
from mecdeploy.training.weight_quantizers import WeightQuantizer

UNITS = {
    # unit: its integers
    "stem": ["stem"],
    "pool": ["pool"],
    "first": ["first"],
    "add": ["add/act", "add/skip"],
    "second": ["second"],
    "add_2": ["add_2"],
    "adaptive_avg_pool2d": ["adaptive_avg_pool2d"],
    "flatten": ["flatten"],
    "hidden": ["hidden"],
    "dropout": [],
    "fc": ["logits"],
}


def calibrated(weight_bits: int = 4, act_bits: int = 4, seed: int = 0) -> QuantizedModel:
    model = prepare(tiny_residual(seed), QuantConfig(weight_bits=weight_bits, act_bits=act_bits), SPEC)
    calibrate(model, [images(16, seed)])
    return model


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def weighted_witness(model: QuantizedModel, name: str, stored: np.ndarray, scale: float, zero: int) -> np.ndarray:
    """The kernel of a unit, from its parameters: stored codes in, stored codes or logits out."""
    unit = model.unit(name)
    assert isinstance(unit, WeightedUnit)
    step, weight = array(unit.weight_quantizer.step), array(unit.weight)
    limit = 2 ** (unit.weight_quantizer.bits - 1)
    ratio = (weight.reshape(len(step), -1) / step[:, None]).reshape(weight.shape)
    codes = np.clip(np.rint(ratio), -limit, limit - 1).astype(np.int64)
    bias = np.zeros_like(step) if unit.bias is None else array(unit.bias)
    if unit.batch_norm is not None:
        norm = unit.batch_norm
        gain = np.abs(array(norm.weight)) / np.sqrt(array(norm.running_var) + np.float32(norm.eps))
        step, bias = step * gain, array(norm.bias) + (bias - array(norm.running_mean)) * gain
    integers = witness.bias_codes(bias, scale, step)
    centred = stored.astype(np.int64) - zero
    if weight.ndim == 2:
        accumulator = centred @ codes.T + integers
    else:
        accumulator = witness.convolve(centred, codes, padding=(1, 1)) + integers[:, None, None]
    if unit.output is None:
        return witness.logits(accumulator, scale, step)
    output = unit.output
    return witness.requantize(accumulator, scale, step, output.step.item(), output.zero_point, output.qmax)


def expected_integers(model: QuantizedModel, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The whole network by hand, kernel after kernel."""
    out: dict[str, np.ndarray] = {}

    def quantizer(name: str, index: int = 0) -> ActivationQuantizer:
        output = model.unit(name).outputs[index]
        assert isinstance(output, ActivationQuantizer)
        return output

    def run(name: str, source: np.ndarray, scale: float, zero: int) -> None:
        out["logits" if name == "fc" else name] = weighted_witness(model, name, source, scale, zero)

    def add(key: str, unit: str, index: int, a: str, b: str, b_scale: float) -> None:
        ours, left = quantizer(unit, index), quantizer(a)
        out[key] = witness.add(
            out[a], left.step.item(), left.zero_point, out[b], b_scale, 0,
            ours.step.item(), ours.zero_point, ours.qmax,
        )  # fmt: skip

    run("stem", pixels, SPEC.pixel_scale, SPEC.pixel_zero_point)
    stem = quantizer("stem").step.item()
    out["pool"] = witness.max_pool(out["stem"], (2, 2), (2, 2), (0, 0), (1, 1), (4, 4))
    run("first", out["pool"], stem, 0)
    add("add/act", "add", 0, "first", "pool", stem)
    add("add/skip", "add", 1, "first", "pool", stem)
    run("second", out["add/act"], quantizer("add", 0).step.item(), 0)
    add("add_2", "add_2", 0, "second", "add/skip", quantizer("add", 1).step.item())
    average = quantizer("adaptive_avg_pool2d")
    out["adaptive_avg_pool2d"] = witness.global_average(
        out["add_2"], quantizer("add_2").step.item(), 0, average.step.item(), 0, average.qmax
    )
    out["flatten"] = out["adaptive_avg_pool2d"].reshape(len(pixels), -1)
    run("hidden", out["flatten"], average.step.item(), 0)
    run("fc", out["hidden"], quantizer("hidden").step.item(), 0)
    return out


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(2, 2), (3, 4), (4, 3), (8, 4), (2, 4)])
def test_integers_are_the_witness_from_pixels_to_logits(weight_bits: int, act_bits: int) -> None:
    model = calibrated(weight_bits, act_bits, seed=weight_bits)
    pixels = images(6, seed=9)

    integers = model.integers(pixels)

    expected = expected_integers(model, array(pixels))
    assert list(integers) == [name for names in UNITS.values() for name in names]
    assert set(expected) == set(integers)
    for name, codes in integers.items():
        assert np.array_equal(codes, expected[name]), name
        assert codes.dtype == (np.float32 if name == "logits" else np.uint8)


def test_integers_stay_in_their_range() -> None:
    model = calibrated(act_bits=2)
    integers = model.integers(images(32))
    for unit in model.units().values():
        for name, output in zip(unit.output_names, unit.outputs, strict=False):
            assert isinstance(output, ActivationQuantizer)
            assert integers[name].max() <= output.qmax
    assert integers["add/act"].max() == 3 and integers["add/skip"].max() > 15
    assert model.unit("first").output.zero_point == 128  # type: ignore[union-attr]


@pytest.mark.parametrize("training", [False, True])
def test_integers_restore_the_mode(training: bool) -> None:
    model = calibrated().train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = model.integers(images(3))["logits"]
    assert model.training == training and all(unit.training == training for unit in model.units().values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert np.array_equal(logits, array(model.eval()(images(3))))
    assert not any(module._forward_hooks for module in model.modules())


def test_integers_depend_on_no_other_image() -> None:
    model, pixels = calibrated(), images(8)
    together = model.integers(pixels)
    for index in (0, 5):
        alone = model.integers(pixels[index : index + 1])
        assert all(np.array_equal(alone[name], together[name][index : index + 1]) for name in alone)


def test_units_in_execution_order() -> None:
    model = calibrated()
    assert list(model.units()) == list(UNITS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int8])
def test_raw_uint8_pixels_are_demanded(dtype: torch.dtype) -> None:
    with pytest.raises(TrainingError, match="the quantised model takes raw uint8 pixels 0..255, not torch"):
        calibrated()(images(1).to(dtype))


def test_state_dict_round_trip_is_bit_identical() -> None:
    ours, theirs = calibrated(seed=1), prepare(tiny_residual(seed=2), QuantConfig(), SPEC)
    pixels = images(5)
    before = theirs.integers(pixels)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    expected, loaded = ours.integers(pixels), theirs.integers(pixels)
    assert any(not np.array_equal(before[name], expected[name]) for name in expected)
    assert all(np.array_equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_the_same_and_lives_alone(copied: Callable[[QuantizedModel], QuantizedModel]) -> None:
    config = QuantConfig(overrides={"hidden": {"weight_bits": 2, "act_bits": 2}})
    model, pixels = prepare(tiny_residual(), config, SPEC), images(3)
    calibrate(model, [images(4, seed=1)])
    model.freeze()
    twin = copied(model)
    expected = model.integers(pixels)
    assert all(np.array_equal(codes, expected[name]) for name, codes in twin.integers(pixels).items())
    assert twin.unit("hidden").frozen
    with torch.no_grad():
        twin.step_sizes()[0].mul_(2)
    assert all(np.array_equal(codes, expected[name]) for name, codes in model.integers(pixels).items())


def test_step_sizes_are_all_of_them() -> None:
    model = calibrated()
    steps = {id(step) for step in model.step_sizes()}
    assert steps == {id(p) for name, p in model.named_parameters() if name.endswith(".step")}
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer | WeightQuantizer)]
    assert len(model.step_sizes()) == len(quantizers) == 5 + 8  # weighted units; outputs, two of them the first sum's


@pytest.mark.parametrize("frozen", [False, True])
def test_every_parameter_gets_a_gradient(frozen: bool) -> None:
    model = calibrated().train()
    if frozen:
        model.freeze()
    torch.manual_seed(0)
    F.cross_entropy(model(images(16)), torch.arange(16) % 4).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        # a bias before a live BatchNorm has a gradient of rounding errors; all others must really have one
        assert name == "body.stem.bias" or bool(parameter.grad.any()), name


def test_frozen_training_is_evaluation() -> None:
    """Bit for bit, and the running statistics stay; live training is neither."""
    model, pixels = calibrated(), images(16)
    evaluated = model.eval()(pixels)
    live = model.train()(pixels)
    model = calibrated()
    model.freeze()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    frozen = model.train()(pixels)
    assert torch.equal(frozen, evaluated)
    assert not torch.equal(live, evaluated)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert frozen.requires_grad


@pytest.mark.parametrize("training", [False, True])
def test_record(training: bool) -> None:
    model, pixels = calibrated().train(training), images(4)
    logits, recording = model(pixels, CODED_TENSORS)

    if not training:
        assert torch.equal(logits, model(pixels))
    assert set(recording.weights) == {name for name, unit in model.units().items() if isinstance(unit, WeightedUnit)}
    names = {name for unit in model.units().values() for name in unit.output_names} - {"logits"}
    assert set(recording.activations) == names
    assert recording.features is not None and recording.features.shape == (4, 8)
    assert torch.equal(recording.features, recording.activations["dropout"])
    if not training:
        integers = model.integers(pixels)
        for unit in model.units().values():
            for name, output in zip(unit.output_names, unit.outputs, strict=False):
                assert isinstance(output, ActivationQuantizer)
                real = (integers[name].astype(np.float32) - output.zero_point) * np.float32(output.step.item())
                assert np.array_equal(array(recording.activations[name]), real), name
    for name, weight in recording.weights.items():
        unit = model.unit(name)
        assert isinstance(unit, WeightedUnit)
        codes = weight / unit.weight_quantizer.step.view(-1, 1)
        assert weight.shape == (unit.weight.shape[0], unit.weight[0].numel())
        # codes * step / step: two roundings of at most 2^-24 each
        torch.testing.assert_close(codes, codes.round(), rtol=3e-7, atol=0)
        limit = 2 ** (unit.weight_quantizer.bits - 1)
        assert -limit <= codes.min().round().item() and codes.max().round().item() <= limit - 1


def test_what_is_recorded_is_attached_to_the_graph() -> None:
    model = calibrated().train()
    _, recording = model(images(8), CODED_TENSORS)
    assert recording.features is not None
    total = recording.features.sum() + sum(a.sum() for a in recording.activations.values())
    (total + sum((w**2).sum() for w in recording.weights.values())).backward()  # type: ignore[union-attr]
    for name, unit in model.units().items():
        if isinstance(unit, WeightedUnit):
            assert unit.weight.grad is not None and bool(unit.weight.grad.any()), name
            assert unit.weight_quantizer.step.grad is not None, name
        for output in unit.outputs:
            assert isinstance(output, ActivationQuantizer) and bool(output.step.grad.any()), name  # type: ignore[union-attr]


def test_only_what_is_asked_for_is_recorded() -> None:
    model = calibrated()
    _, recording = model(images(2), ("features",))
    assert recording.features is not None and not recording.activations and not recording.weights
    _, recording = model(images(2), ("activations",))
    assert recording.features is None and recording.activations and not recording.weights
    _, recording = model(images(2), ("weights",))
    assert recording.features is None and not recording.activations and recording.weights


def test_a_few_steps_of_training_learn() -> None:
    """Live then frozen: the loss falls, and what was trained frozen is what evaluation computes."""
    model = calibrated()
    labels = torch.arange(32) % 4
    pixels = images(32) // 4 + 60 * labels.view(-1, 1, 1, 1).to(torch.uint8)  # brighter from class to class
    torch.manual_seed(0)
    losses = []
    for step in range(100):
        if step == 60:
            model.freeze()
        model.zero_grad()
        loss = F.cross_entropy(model.train()(pixels), labels)
        loss.backward()
        with torch.no_grad():  # plain gradient descent: importing an optimiser takes seconds
            for parameter in model.parameters():
                parameter.sub_(0.02 * parameter.grad)  # type: ignore[operator]
        losses.append(loss.item())
    # seen: 1.48 at first, 1.0 before freezing, 0.5 at the end; a gradient of the wrong sign or scale goes nowhere
    assert sum(losses[50:60]) / 10 < 0.8 * losses[0]
    assert sum(losses[90:]) / 10 < 0.5 * losses[0]
    assert torch.equal(model.train()(pixels), model.eval()(pixels))


def test_a_dead_network_computes_finite_numbers() -> None:
    """All gammas 0 and huge betas: scales at their floor, biases at their limit, still integers and no NaN."""
    model = calibrated()
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.weight.zero_()
            norm.bias.copy_(torch.tensor([1e7, -1e7, 0.0, 1e-7, 1.0, -1.0]))
    pixels = images(4)
    integers = model.integers(pixels)
    assert np.isfinite(integers["logits"]).all()
    assert (integers["stem"][:, 0] == 255).all() and (integers["stem"][:, 1] == 0).all()
    model.freeze()
    model.train()(pixels).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
