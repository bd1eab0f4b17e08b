"""First step sizes against brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_networks import SPEC, images, tiny_residual
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training.calibration import CANDIDATES, calibrate, search_steps
from mecdeploy.training.config import QuantConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.preparation import prepare
from mecdeploy.training.quantizers import ActivationQuantizer
from mecdeploy.training.units import WeightedUnit


def brute_force(values: np.ndarray, lower: int, upper: int) -> tuple[float, float]:
    """Least mean square error over the candidates, and the step that clips nothing; in float64."""
    values = values.astype(np.float64)
    reach = max(values.max() / upper, values.min() / lower if lower else 0.0)
    errors = []
    for index in range(1, CANDIDATES + 1):
        step = reach * index / CANDIDATES
        real = np.clip(np.rint(values / step), lower, upper) * step
        errors.append(((real - values) ** 2).mean())
    return min(errors), reach


def error_of(values: np.ndarray, step: float, lower: int, upper: int) -> float:
    values = values.astype(np.float64)
    return float(((np.clip(np.rint(values / step), lower, upper) * step - values) ** 2).mean())


ROWS = {
    "normal": lambda rng: rng.normal(0, 0.3, 900),
    "long-tailed": lambda rng: rng.standard_t(2, 900),
    "positive": lambda rng: rng.exponential(2.0, 900),
    "negative": lambda rng: -rng.exponential(2.0, 900),
    "one-sided spike": lambda rng: np.r_[rng.normal(0, 1, 899), 60.0],
    "tiny": lambda rng: rng.normal(0, 1e-7, 900),
    "constant": lambda rng: np.full(900, 0.7),
}


@pytest.mark.parametrize(("lower", "upper"), [(-2, 1), (-4, 3), (-8, 7), (-128, 127), (0, 3), (0, 15), (0, 255)])
def test_search_steps(lower: int, upper: int) -> None:
    rng = np.random.default_rng(upper)
    values = np.stack([make(rng) for make in ROWS.values()]).astype(np.float32)
    if lower == 0:
        values = np.abs(values)
    steps = search_steps(torch.from_numpy(values), lower, upper)
    for kind, row, step in zip(ROWS, values, steps.tolist(), strict=True):
        least, reach = brute_force(row, lower, upper)
        # candidates of nearly equal error may swap in float32, whose own rounding of the largest value is no error of 0
        assert error_of(row, step, lower, upper) <= least * (1 + 1e-4) + (2**-23 * np.abs(row).max()) ** 2, kind
        index = step / reach * CANDIDATES
        assert abs(index - round(index)) < 1e-4 and 1 <= round(index) <= CANDIDATES, kind


def test_rows_of_zeros_get_a_step() -> None:
    """No step is better than another; the one that reaches 1 is far from underflow."""
    assert search_steps(torch.zeros(2, 5), -8, 7).tolist() == [torch.tensor(1 / 7).item()] * 2
    assert search_steps(torch.zeros(1, 5), 0, 255).tolist() == [torch.tensor(1 / 255).item()]


def prepared(**config: int) -> QuantizedModel:
    return prepare(tiny_residual(), QuantConfig(**config), SPEC)


def norm_of(unit: WeightedUnit) -> nn.BatchNorm2d:
    assert unit.batch_norm is not None
    return unit.batch_norm


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(2, 2), (4, 4), (8, 8)])
def test_steps_are_those_of_the_weights_and_of_the_float_activations(weight_bits: int, act_bits: int) -> None:
    """The first two units by hand: activations stay float, weights are quantised, BatchNorm is of the batch."""
    model = prepared(weight_bits=weight_bits, act_bits=act_bits, skip_bits=act_bits)
    pixels = images(16)
    calibrate(model, [pixels])

    x = SPEC.normalize(pixels)
    for name, shortcut in (("stem", None), ("first", "stem")):
        unit = model.unit(name)
        assert isinstance(unit, WeightedUnit)
        lower, upper = unit.weight_quantizer.lower, unit.weight_quantizer.upper
        steps = unit.weight_quantizer.step.detach()
        for row, step in zip(unit.weight.detach().flatten(1).numpy(), steps.tolist(), strict=True):
            assert error_of(row, step, lower, upper) <= brute_force(row, lower, upper)[0] * (1 + 1e-4) + 1e-12
        view = steps.view(-1, 1, 1, 1)
        weight = torch.round(unit.weight / view).clamp(lower, upper) * view
        norm = norm_of(unit)
        y = F.batch_norm(F.conv2d(x, weight, unit.bias, padding=1), None, None, norm.weight, norm.bias, training=True)
        if shortcut is None:
            y = F.relu(y)
        assert unit.output is not None
        low, high = (0, 2**act_bits - 1) if shortcut is None else (-(2 ** (act_bits - 1)), 2 ** (act_bits - 1) - 1)
        values = y.detach().flatten().numpy()
        # 1e-3: float32 batch statistics move the values by 1e-6, and an error is second order in the step at best
        least = brute_force(values, low, high)[0]
        assert error_of(values, unit.output.step.item(), low, high) <= least * (1 + 1e-3)
        x = F.max_pool2d(y, 2)


def test_calibration_leaves_the_running_statistics_and_the_mode() -> None:
    for training in (False, True):
        model = prepared().train(training)
        norms = {key: value.clone() for key, value in model.state_dict().items() if "batch_norm" in key}
        assert any(key.endswith("num_batches_tracked") for key in norms)
        momenta = [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        calibrate(model, [images(5), images(3, seed=1)])
        assert all(torch.equal(value, norms[key]) for key, value in model.state_dict().items() if key in norms)
        assert [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)] == momenta
        assert model.training == training


def test_calibration_sees_whole_activations_not_dropped_ones() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    with_dropout = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 2))
    without = nn.Sequential(*layers[:2], nn.Identity(), *layers[3:], *with_dropout[6:])
    steps = []
    for network in (with_dropout, without):
        model = prepare(network, QuantConfig(), SPEC)
        calibrate(model, [images(6)])
        steps.append(activation_steps(model))
    assert steps[0] == steps[1]


def activation_steps(model: QuantizedModel) -> list[float]:
    return [module.step.item() for module in model.modules() if isinstance(module, ActivationQuantizer)]


def test_every_batch_counts_and_nothing_is_kept() -> None:
    one, two, again = prepared().eval(), prepared().eval(), prepared().eval()
    torch.manual_seed(0)
    calibrate(one, [images(4)])
    torch.manual_seed(0)
    calibrate(again, iter([images(4)]))
    torch.manual_seed(0)
    calibrate(two, [images(4), images(4, seed=1) // 2 + 64])
    assert activation_steps(one) == activation_steps(again)
    assert activation_steps(one) != activation_steps(two)
    assert all(module.samples is None for module in two.modules() if isinstance(module, ActivationQuantizer))


def test_large_activations_are_sampled_from_everywhere() -> None:
    """A stride that shared a factor with the width would see some columns only."""
    quantizer = ActivationQuantizer(8, signed=True)
    quantizer.samples = []
    x = torch.arange(64.0).expand(32, 16, 64, 64).contiguous()
    quantizer(x)
    (kept,) = quantizer.samples
    assert 8_000 <= len(kept) <= 40_000
    counts = torch.bincount(kept.long(), minlength=64).double()
    assert counts.min().item() > 0.9 * counts.mean().item()


def test_relu6_bounds_the_step() -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(F.relu6(self.conv(x)), 1), 1))
            return logits

    torch.manual_seed(0)
    model = Clipped()
    with torch.no_grad():
        model.conv.weight.mul_(100.0)
    quantized = prepare(model, QuantConfig(), SPEC)
    calibrate(quantized, [images(4)])
    output = quantized.unit("conv").output
    assert output is not None
    assert output.step.item() == pytest.approx(6 / 255, rel=1e-6)  # one float32 rounding


def test_no_batches() -> None:
    with pytest.raises(TrainingError, match="calibration got no images; give it at least one batch."):
        calibrate(prepared(), [])


def test_an_activation_that_is_not_finite_is_named() -> None:
    model = prepared()
    with torch.no_grad():
        norm_of(model.unit("first")).bias.fill_(float("inf"))  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match="^first: its activation is not finite on the calibration images; "):
        calibrate(model, [images(4)])
    assert all(module.samples is None for module in model.modules() if isinstance(module, ActivationQuantizer))


@pytest.mark.parametrize("constant", [0.0, -3.0, 2.5])
def test_constant_activations_and_images_give_no_nan(constant: float) -> None:
    model = prepared()
    with torch.no_grad():
        for name in ("stem", "first", "second"):
            norm_of(model.unit(name)).weight.zero_()  # type: ignore[arg-type]
            norm_of(model.unit(name)).bias.fill_(constant)  # type: ignore[arg-type]
    calibrate(model, [torch.full((4, 3, 8, 8), 121, dtype=torch.uint8)])
    assert all(0.0 < step < float("inf") for step in activation_steps(model))
    for training in (True, False):
        logits = model.train(training)(images(4))
        assert bool(torch.isfinite(logits).all())
    logits.sum().backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())
