"""Learned zero points (LSQ+), rectified and shared quantisers, against loops over the cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mecdeploy.training.calibration import CANDIDATES, search_step_and_zero
from mecdeploy.training.quantizers import ActivationQuantizer, QTensor


def quantizer(zero: float, *, bits: int = 4, rectified: bool = False, step: float = 0.37) -> ActivationQuantizer:
    output = ActivationQuantizer(bits, signed=True, rectified=rectified, learn_zero_point=True)
    assert output.offset is not None
    with torch.no_grad():
        output.step.fill_(step)
        output.offset.fill_(zero * step)
    return output


@pytest.mark.parametrize(("zero", "code"), [(3.2, 3), (3.6, 4), (2.4, 2), (-4.0, 0), (99.0, 15), (0.0, 0), (15.0, 15)])
def test_the_zero_point_is_a_code(zero: float, code: int) -> None:
    output = quantizer(zero)
    assert output.zero_point == code
    result = output(torch.zeros(1, 3))
    assert result.stored().tolist() == [[code] * 3] and bool((result.dequantize() == 0).all())


def way(name: str, output: ActivationQuantizer, x: torch.Tensor) -> QTensor:
    """The three ways in which kernels quantise."""
    step = output.effective_step(x[0].numel())
    if name == "forward":
        return output(x)
    return (
        output.from_ratio(x / step, step) if name == "ratio" else output.from_stored(x / step + output.zero_point, step)
    )


@pytest.mark.parametrize("name", ["forward", "ratio", "stored"])
@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("zero", [3.2, 0.0, 15.0, 7.0])
def test_gradients(name: str, rectified: bool, zero: float) -> None:
    """Inside the range the offset changes nothing; outside it moves the bound, and so does the step (eq. 8 and 9)."""
    output = quantizer(zero, rectified=rectified)
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(3, 40, generator=generator) * 3).requires_grad_()
    upstream = torch.randn(3, 40, generator=generator)
    result = way(name, output, x)
    (result.dequantize() * upstream).sum().backward()

    zero_point, step = output.zero_point, output.step.item()
    lower, upper = (0 if rectified else -zero_point), 15 - zero_point
    offset_gradient, step_gradient = 0.0, 0.0
    assert output.offset is not None
    zero_learned = (output.offset / output.step).item()
    for value, g, code, grad in zip(*(t.flatten().tolist() for t in (x, upstream, result.codes, x.grad)), strict=True):  # type: ignore[arg-type]
        ratio = value / step
        assert code == min(max(round(ratio), lower), upper)
        if lower < ratio < upper:
            step_gradient += g * (code - ratio)
            assert grad == pytest.approx(g, rel=1e-6)  # times the step and its reciprocal: float32 roundings
            continue
        assert grad == 0.0
        if ratio < upper and rectified:
            continue  # a ReLU's lower bound is real 0, wherever the offset is
        offset_gradient -= g
        # offset - step * zero_learned is real 0: 0 below, qmax above, but for the rounding of the zero point
        step_gradient += g * (code + zero_learned)
    factor = (40 * max(1, upper)) ** -0.5
    assert output.offset.grad is not None and output.step.grad is not None
    # 1e-4: float32 sums of 120 terms
    assert float(output.offset.grad) == pytest.approx(offset_gradient * factor, rel=1e-4, abs=1e-4)
    assert float(output.step.grad) == pytest.approx(step_gradient * factor, rel=1e-4, abs=1e-4)


def test_a_step_against_the_gradient_lowers_the_error() -> None:
    """Skewed values, as swish makes them: the zero point goes down from the middle to where they begin."""
    values = torch.nn.functional.silu(torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)) * 3)
    output = quantizer(8.0, step=0.4)
    assert output.offset is not None
    errors = []
    for _ in range(60):
        output.zero_grad()
        error = (output(values).dequantize() - values).square().sum()
        error.backward()
        with torch.no_grad():
            output.offset -= 0.004 * output.offset.grad
            output.step -= 1e-6 * output.step.grad
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0] and output.zero_point < 6


def test_shared_quantisers_add_up_their_gradients() -> None:
    first, second = quantizer(5.3), quantizer(9.0, rectified=True)
    second.share(first)
    assert second.step is first.step and second.offset is first.offset
    assert (second.zero_point, second.qmin, first.qmin) == (5, 5, 0)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 30, generator=generator) * 4 for _ in range(2))
    (first(x).dequantize().sum() + second(y).dequantize().sum()).backward()
    both = [float(p.grad) for p in (first.step, first.offset)]  # type: ignore[arg-type, union-attr]
    alone = []
    for index, (quantiser, values) in enumerate(((first, x), (second, y))):
        first.zero_grad()
        quantiser(values).dequantize().sum().backward()
        alone.append([float(p.grad) for p in (first.step, first.offset)])  # type: ignore[arg-type, union-attr]
        assert all(alone[index])
    assert both == pytest.approx([a + b for a, b in zip(*alone, strict=True)], rel=1e-5)  # float32 sums


SAMPLES = {
    "normal": lambda rng: rng.normal(0, 0.3, 700),
    "swish": lambda rng: (lambda x: x / (1 + np.exp(-x)))(rng.normal(0, 3, 700)),
    "positive": lambda rng: rng.exponential(2.0, 700),
    "negative": lambda rng: -rng.exponential(2.0, 700),
    "far from zero": lambda rng: rng.normal(50, 0.5, 700),
    "spike": lambda rng: np.r_[rng.normal(0, 1, 699), 60.0],
}


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("qmax", [3, 15, 255])
def test_calibration_finds_the_best_range(kind: str, qmax: int) -> None:
    values = SAMPLES[kind](np.random.default_rng(1)).astype(np.float32)

    step, zero = search_step_and_zero(torch.from_numpy(values), qmax)

    low, high = min(values.min(), 0.0), max(values.max(), 0.0)

    def error(step: float, zero: float) -> float:
        x = values.astype(np.float64)
        return float(((np.clip(np.rint(x / step), -zero, qmax - zero) * step - x) ** 2).mean())

    candidates = []
    for index in range(1, CANDIDATES + 1):
        fraction = index / CANDIDATES
        candidate = (float(high) - float(low)) * fraction / qmax
        candidates.append(error(candidate, np.rint(-float(low) * fraction / candidate)))
    assert 0 <= zero.item() <= qmax and zero.item() == round(zero.item())
    # candidates of nearly equal error may swap in float32
    assert error(step.item(), zero.item()) <= min(candidates) * (1 + 1e-3)


def test_calibration_of_nothing_keeps_a_step() -> None:
    step, zero = search_step_and_zero(torch.zeros(5), 15)
    assert (step.item(), zero.item()) == (pytest.approx(1 / 15), 0.0)
