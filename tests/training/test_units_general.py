"""Gradients of products, gates, slopes and means in both phases: finite differences, and LSQ's cases in a loop."""

from __future__ import annotations

from collections.abc import Callable
from math import exp
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mecdeploy.training.geometry import Geometry, sides
from mecdeploy.training.quantizers import ActivationQuantizer, QTensor
from mecdeploy.training.units import AveragePoolUnit, ElementwiseUnit

Function = Callable[..., float]

FUNCTIONS: dict[str, tuple[Function, float]] = {
    # of reals; alpha
    "mul": (lambda a, b: a * b, 0.0),
    "sigmoid": (lambda x: 1 / (1 + exp(-x)), 0.0),
    "hard_sigmoid": (lambda x: min(max(x / 6 + 0.5, 0.0), 1.0), 0.0),
    "leaky_relu": (lambda x: x if x > 0 else 0.2 * x, 0.2),
}


def quantizer(step: float, *, signed: bool = True, zero: float | None = None) -> ActivationQuantizer:
    output = ActivationQuantizer(4, signed=signed, learn_zero_point=zero is not None)
    with torch.no_grad():
        output.step.fill_(step)
        if zero is not None:
            assert output.offset is not None
            output.offset.fill_(zero * step)
    return output


def random_codes(shape: tuple[int, ...], scale: float, seed: int) -> QTensor:
    """Never 0, where leaky_relu has a kink."""
    codes = torch.randint(-128, 127, shape, generator=torch.Generator().manual_seed(seed)).float()
    codes[codes == 0] = 1.0
    return QTensor(codes.requires_grad_(), torch.tensor(scale, requires_grad=True), 128, 255)


def slope(function: Function, at: list[float], index: int) -> float:
    """Central difference; 1e-6 is exact to 1e-9 for these functions away from their kinks."""
    up, down = list(at), list(at)
    up[index] += 1e-6
    down[index] -= 1e-6
    return (function(*up) - function(*down)) / 2e-6


CASES: dict[str, tuple[str, list[tuple[int, ...]], float, dict[str, Any]]] = {
    # function, shapes of the inputs, output step
    "product": ("mul", [(2, 3, 4, 4), (2, 3, 4, 4)], 0.31, {}),
    "broadcast product": ("mul", [(2, 3, 4, 4), (2, 3, 1, 1)], 0.31, {}),
    "product, learned zero point": ("mul", [(2, 3, 4, 4), (2, 3, 1, 1)], 0.2, {"zero": 3.2}),
    "sigmoid": ("sigmoid", [(2, 3, 4, 4)], 0.05, {"signed": False}),
    "hard sigmoid": ("hard_sigmoid", [(2, 3, 4, 4)], 0.06, {"signed": False}),
    "leaky_relu": ("leaky_relu", [(2, 3, 4, 4)], 0.2, {}),
    "leaky_relu, learned zero point": ("leaky_relu", [(2, 3, 4, 4)], 0.2, {"zero": 1.7}),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_elementwise_units(case: str, frozen: bool) -> None:
    name, shapes, step, options = CASES[case]
    function, alpha = FUNCTIONS[name]
    output = quantizer(step, **options)
    unit = ElementwiseUnit(name, alpha, [output], ("y",)).train()
    unit.frozen = frozen
    inputs = [random_codes(shape, 0.0273, seed) for seed, shape in enumerate(shapes)]
    result = unit(*inputs)
    upstream = torch.randn(result.codes.shape, generator=torch.Generator().manual_seed(9))
    (result.dequantize() * upstream).sum().backward()

    expected = by_hand(function, inputs, output, upstream)
    # 1e-4: float32 sums of some hundred terms, of which the steps' cancel to a tenth
    for x, (codes, scale) in zip(inputs, expected["inputs"], strict=True):
        assert_near(x.codes.grad, codes)
        assert_near(x.scale.grad, np.array(scale))
    assert_near(output.step.grad, np.array(expected["step"]))
    if output.offset is not None:
        assert_near(output.offset.grad, np.array(expected["offset"]))


def assert_near(ours: Tensor | None, theirs: np.ndarray) -> None:
    assert ours is not None and np.abs(theirs).max() > 0
    assert np.abs(ours.detach().double().numpy() - theirs).max() <= 1e-4 * np.abs(theirs).max()


def by_hand(function: Function, inputs: list[QTensor], output: ActivationQuantizer, upstream: Tensor) -> Any:
    """LSQ (eq. 3 and 5) and LSQ+ (eq. 8 and 9, with its offset rounded to steps) value by value."""
    moved = 0.0 if output.offset is None else (output.offset / output.step).item()
    step, zero = output.step.item(), output.zero_point
    lower, upper = -zero, output.qmax - zero
    factor = (upstream[0].numel() * max(1, upper)) ** -0.5
    shape = tuple(upstream.shape)
    reals = [np.broadcast_to(x.codes.detach().double().numpy() * x.scale.item(), shape) for x in inputs]
    wide = [np.zeros(shape) for _ in inputs]
    step_gradient = offset_gradient = 0.0
    for place in np.ndindex(shape):
        at, g = [float(real[place]) for real in reals], float(upstream[place])
        ratio = function(*at) / step
        if lower < ratio < upper:
            for index, gradient in enumerate(wide):
                gradient[place] = g * slope(function, at, index)
            step_gradient += g * (round(ratio) - ratio)
        else:
            step_gradient += g * ((lower if ratio <= lower else upper) + moved)
            offset_gradient -= g
    found = []
    for x, gradient in zip(inputs, wide, strict=True):
        axes = tuple(axis for axis, size in enumerate(x.codes.shape) if size < shape[axis])
        own = gradient.sum(axes, keepdims=True)
        found.append((own * x.scale.item(), float((own * x.codes.detach().double().numpy()).sum())))
    return {"inputs": found, "step": step_gradient * factor, "offset": offset_gradient * factor}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("include_pad", [False, True])
def test_gradients_of_windowed_means(frozen: bool, include_pad: bool) -> None:
    """Each place gets its share of every window that holds it, divided by the places that count there."""
    output = quantizer(0.21)
    geometry = Geometry(stride=(2, 1), padding=sides((1, 0)))
    unit = AveragePoolUnit((3, 2), geometry, include_pad, [output], ("y",)).train()
    unit.frozen = frozen
    x = random_codes((2, 2, 5, 4), 0.0273, 1)
    result = unit(x)
    upstream = torch.randn(result.codes.shape, generator=torch.Generator().manual_seed(9))
    (result.dequantize() * upstream).sum().backward()

    real = x.codes.detach().double().numpy() * x.scale.item()
    gradient, step_gradient = np.zeros(real.shape), 0.0
    for n, c, i, j in np.ndindex(*upstream.shape):
        rows = [row for row in range(2 * i - 1, 2 * i + 2) if 0 <= row < 5]
        window = [(n, c, row, column) for row in rows for column in (j, j + 1)]
        count = 6 if include_pad else len(window)
        ratio = sum(real[place] for place in window) / count / output.step.item()
        g = float(upstream[n, c, i, j])
        if -8 < ratio < 7:
            step_gradient += g * (round(ratio) - ratio)
            for place in window:
                gradient[place] += g / count
        else:
            step_gradient += g * (-8 if ratio <= -8 else 7)
    assert_near(x.codes.grad, gradient * x.scale.item())
    assert_near(output.step.grad, np.array(step_gradient * (upstream[0].numel() * 7) ** -0.5))


@pytest.mark.parametrize("case", CASES)
def test_frozen_training_computes_what_evaluation_computes(case: str) -> None:
    name, shapes, step, options = CASES[case]
    unit = ElementwiseUnit(name, FUNCTIONS[name][1], [quantizer(step, **options)], ("y",))
    inputs = [random_codes(shape, 0.0273, seed) for seed, shape in enumerate(shapes)]
    with torch.no_grad():
        evaluated = unit.eval()(*inputs)
    unit.train().frozen = True
    assert torch.equal(unit(*inputs).codes, evaluated.codes)


def test_live_gates_are_the_functions_of_torch() -> None:
    """On reals: nothing of the integer kernel's approximation is in the first phase."""
    x = random_codes((1, 200), 0.05, 0)
    for name, module in {
        "sigmoid": nn.Sigmoid(),
        "hard_sigmoid": nn.Hardsigmoid(),
        "leaky_relu": nn.LeakyReLU(0.2),
    }.items():
        output = quantizer(0.07)
        result = ElementwiseUnit(name, FUNCTIONS[name][1], [output], ("y",)).train()(x)
        assert torch.equal(result.codes, torch.round(module(x.dequantize()) / output.step).clamp(-8, 7))
