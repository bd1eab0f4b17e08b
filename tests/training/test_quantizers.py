"""LSQ against a loop over the cases of its paper (Esser et al. 2020, arXiv:1902.08153).

The boundary convention, checked here: a value exactly at a bound counts as outside, as in the paper's eq. 3 and 5. Its
own gradient is 0 and the step's is the bound.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mecdeploy.training.lsq import (
    clamp_scaling_gradient,
    fake_quantize,
    quantize,
    round_clamp,
    round_through,
    scale_gradient,
)
from mecdeploy.training.quantizers import SMALLEST_STEP, ActivationQuantizer, QTensor
from mecdeploy.training.weight_quantizers import WeightQuantizer

RANGES = [(-2, 1), (-4, 3), (-8, 7), (-128, 127), (0, 3), (0, 7), (0, 15), (0, 255)]
"""Signed weights and unsigned activations of 2, 3, 4 and 8 bits."""


def lsq(v: float, step: float, lower: int, upper: int) -> tuple[int, float, float]:
    """Code, d real / d v and d real / d step of one value; ratio in float32, as the quantizer computes it."""
    ratio = float(np.float32(v) / np.float32(step))
    if ratio <= lower:
        return lower, 0.0, float(lower)
    if ratio >= upper:
        return upper, 0.0, float(upper)
    code = round(ratio)  # Python rounds half to even
    return code, 1.0, code - ratio


def cases(lower: int, upper: int, step: float) -> list[float]:
    """Below, at and just inside both bounds, ties, zero, values of both signs, and far outside."""
    ratios = [lower - 3.7, lower - 0.5, lower, lower + 0.25, -0.5, 0.0, 0.5, 1.5, 2.5, 0.49, upper - 0.25, upper]
    ratios += [upper + 0.5, upper + 9.1, 0.3, -0.3, -1.5, 100.0 * upper, -100.0 * upper]
    return [ratio * step for ratio in ratios]


@pytest.mark.parametrize("bounds", RANGES)
@pytest.mark.parametrize("step", [0.25, 0.1, 3.0])
def test_fake_quantize_is_lsq(bounds: tuple[int, int], step: float) -> None:
    lower, upper = bounds
    values = cases(lower, upper, step)
    x = torch.tensor(values, requires_grad=True)
    s = torch.tensor(step, requires_grad=True)
    upstream = torch.linspace(-1.0, 2.0, len(values))

    real = fake_quantize(x, s, lower, upper)
    (real * upstream).sum().backward()

    expected = [lsq(v, step, lower, upper) for v in x.tolist()]
    codes = torch.tensor([float(code) for code, _, _ in expected])
    assert torch.equal(quantize(x, s, lower, upper), codes)
    assert torch.equal(real, codes * s)
    inside = torch.tensor([gradient for _, gradient, _ in expected])
    # real = codes * step: the gradient is multiplied by the step and by its reciprocal, two roundings
    torch.testing.assert_close(x.grad, upstream * inside, rtol=3e-7, atol=0)
    grad_step = sum(g * term for g, (_, _, term) in zip(upstream.tolist(), expected, strict=True))
    # codes and ratios of at most |bound| are subtracted in float32, once a value
    bound = len(values) * max(-lower, upper) * 2 * 2**-22
    assert abs(float(s.grad) - grad_step) <= bound


@pytest.mark.parametrize("bounds", RANGES)
def test_a_value_at_a_bound_is_outside(bounds: tuple[int, int]) -> None:
    lower, upper = bounds
    for bound in bounds:
        x = torch.tensor([bound * 0.5], requires_grad=True)
        step = torch.tensor(0.5, requires_grad=True)
        fake_quantize(x, step, lower, upper).sum().backward()
        assert (float(x.grad), float(step.grad)) == (0.0, bound)


def test_steps_per_channel_keep_to_their_channel() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 40, generator=generator).requires_grad_()
    step = torch.tensor([[0.5], [0.13], [2.0]], requires_grad=True)
    upstream = torch.randn(3, 40, generator=generator)

    (fake_quantize(x, step, -4, 3) * upstream).sum().backward()

    for channel in range(3):
        rows = [lsq(v, step[channel].item(), -4, 3) for v in x[channel].tolist()]
        expected = sum(g * term for g, (_, _, term) in zip(upstream[channel].tolist(), rows, strict=True))
        assert abs(float(step.grad[channel]) - expected) < 40 * 8 * 2**-22  # as above
        torch.testing.assert_close(
            x.grad[channel], upstream[channel] * torch.tensor([r[1] for r in rows]), rtol=3e-7, atol=0
        )


def test_quantize_divides() -> None:
    """QuantizeLinear divides; multiplying by the reciprocal gives other codes near ties."""
    rng = np.random.default_rng(0)
    step = np.float32(0.0172)
    x = ((rng.integers(0, 255, 20_000) + 0.5) * float(step)).astype(np.float32)
    divided = np.clip(np.rint(x / step), 0, 255)
    multiplied = np.clip(np.rint(x * (np.float32(1) / step)), 0, 255)
    assert (divided != multiplied).any(), "these values would not tell the two apart"
    assert np.array_equal(quantize(torch.from_numpy(x), torch.tensor(step), 0, 255).numpy(), divided)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_quantizer_scales_the_gradient_by_the_weights_of_a_channel(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(3, 5, 2, 2, generator=generator)
    upstream = torch.randn(3, 5, 2, 2, generator=generator)
    quantizer = WeightQuantizer(bits, 3)
    with torch.no_grad():
        quantizer.step.copy_(torch.tensor([0.4, 0.05, 1.7]))

    codes, step = quantizer(weight)
    (codes * step.view(-1, 1, 1, 1) * upstream).sum().backward()

    lower, upper = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert (quantizer.lower, quantizer.upper) == (lower, upper)
    for channel in range(3):
        values, grads = weight[channel].flatten().tolist(), upstream[channel].flatten().tolist()
        rows = [lsq(v, quantizer.step[channel].item(), lower, upper) for v in values]
        assert codes[channel].flatten().tolist() == [row[0] for row in rows]
        expected = sum(g * row[2] for g, row in zip(grads, rows, strict=True)) / math.sqrt(20 * upper)
        assert abs(float(quantizer.step.grad[channel]) - expected) < 20 * -lower * 2 * 2**-22  # as above


@pytest.mark.parametrize(("bits", "signed"), [(2, False), (4, False), (8, False), (2, True), (3, True), (8, True)])
def test_activation_quantizer_scales_the_gradient_by_the_features_of_a_sample(bits: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(4, 3, 5, 2, generator=generator)
    upstream = torch.randn(4, 3, 5, 2, generator=generator)
    quantizer = ActivationQuantizer(bits, signed=signed)
    with torch.no_grad():
        quantizer.step.fill_(0.37)

    y = quantizer(x)
    (y.dequantize() * upstream).sum().backward()

    zero_point = 2 ** (bits - 1) if signed else 0
    lower, upper = -zero_point, 2**bits - 1 - zero_point
    assert (y.zero_point, y.qmax, y.lower, y.upper) == (zero_point, 2**bits - 1, lower, upper)
    rows = [lsq(v, quantizer.step.item(), lower, upper) for v in x.flatten().tolist()]
    assert y.codes.flatten().tolist() == [row[0] for row in rows]
    assert y.stored().dtype == torch.uint8
    assert y.stored().flatten().tolist() == [row[0] + zero_point for row in rows]
    terms = [g * row[2] for g, row in zip(upstream.flatten().tolist(), rows, strict=True)]
    # 30 features a sample, not 120 values a batch: the batch size changes no learning rate
    expected = sum(terms) / math.sqrt(30 * max(1, upper))
    assert abs(float(quantizer.step.grad) - expected) < 120 * 2**bits * 2**-22  # as above


def test_a_maximum_bounds_the_step_and_lets_its_gradient_back() -> None:
    quantizer = ActivationQuantizer(2, signed=False, maximum=6.0)
    with torch.no_grad():
        quantizer.step.fill_(50.0)
    x = torch.tensor([[1.0, 3.1, 5.0, 9.0]])
    y = quantizer(x)
    assert y.scale.item() == 2.0 and y.codes.tolist() == [[0.0, 2.0, 2.0, 3.0]]  # 6 / 3 a step; 0.5 is a tie
    assert y.dequantize().max().item() == 6.0
    y.dequantize().sum().backward()
    assert float(quantizer.step.grad) != 0.0


@pytest.mark.parametrize("step", [0.0, -1.0, 0.5])
def test_zeros_and_steps_gone_negative_give_no_nan(step: float) -> None:
    activation, weight = ActivationQuantizer(4, signed=False), WeightQuantizer(4, 2)
    with torch.no_grad():
        activation.step.fill_(step)
        weight.step.fill_(step)
    for module, x in ((activation, torch.zeros(2, 3)), (weight, torch.zeros(2, 3))):
        x.requires_grad_()
        result = module(x)
        codes, scale = (result.codes, result.scale) if isinstance(result, QTensor) else result
        (codes * scale.reshape(-1, *[1] * scale.dim())).sum().backward()
        assert torch.equal(codes, torch.zeros(2, 3)) and bool((scale >= SMALLEST_STEP).all())
        assert bool(torch.isfinite(x.grad).all()) and bool(torch.isfinite(module.step.grad).all())


def gradient_of(function: object, values: list[float]) -> tuple[list[float], list[float]]:
    x = torch.tensor(values, requires_grad=True)
    y: Tensor = function(x)  # type: ignore[operator]
    (y * torch.arange(1.0, len(values) + 1)).sum().backward()
    return y.tolist(), x.grad.tolist()


def test_round_clamp() -> None:
    values, grads = gradient_of(lambda x: round_clamp(x, -2, 1), [-2.5, -2.0, -1.5, -0.5, 0.5, 0.9, 1.0, 1.5])
    assert values == [-2, -2, -2, 0, 0, 1, 1, 1]
    assert grads == [0, 0, 3, 4, 5, 6, 0, 0]


def test_round_through() -> None:
    x = [-2.5, -1.5, 0.49999997, 0.5, 1.5, 8388607.5, 2.0**30, 0.0]
    values, grads = gradient_of(round_through, x)
    assert values == [float(round(v)) for v in x]
    assert grads == [1, 2, 3, 4, 5, 6, 7, 8]
    assert round_through(torch.tensor(x)).tolist() == values


def test_round_through_with_gradient_rounds_to_the_same_bits() -> None:
    """It is written as x + (round(x) - x): exact for every float32, or training and evaluation would part."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-20, 31, (50_000,), generator=generator)
    x = torch.randn(50_000, generator=generator) * 2.0**exponents
    assert torch.equal(round_through(x.clone().requires_grad_()), torch.round(x))


def test_scale_gradient() -> None:
    assert gradient_of(lambda x: scale_gradient(x, 0.25), [1.5, -2.0]) == ([1.5, -2.0], [0.25, 0.5])


def test_clamp_scaling_gradient() -> None:
    values, grads = gradient_of(lambda x: clamp_scaling_gradient(x, 0.0, 2.0, 0.5), [-1.0, 0.5, 7.0])
    assert values == [0.0, 0.5, 2.0]
    assert grads == [0.5, 1, 1.5]
