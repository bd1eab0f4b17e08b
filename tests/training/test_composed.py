"""The twice differentiable form computes the fused form's integers, and its first gradients, everywhere it is used.

Single functions in float64, whose gradients agree to its rounding over sums of some hundred products: 1e-12. Whole
networks in float32, as they are deployed: a step's gradient is a sum over all positions whose terms, up to about 1,
cancel, so that rounding (6e-8) is what is left of it: 2e-7.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_networks import SPEC, images, tiny_residual
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training.calibration import calibrate
from mecdeploy.training.composed import composing, twice_differentiable
from mecdeploy.training.config import QuantConfig
from mecdeploy.training.fused import add_quantize, normalize_quantize, scale_quantize
from mecdeploy.training.lsq import quantize, round_clamp
from mecdeploy.training.preparation import prepare

BOUNDS = [(0, 15), (-8, 7), (-2, 1), (0, 255)]


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale
    return values.requires_grad_()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def gradients(codes: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    total = torch.stack([(c * draw(*c.shape, seed=9 + i).detach()).sum() for i, c in enumerate(codes)]).sum()
    return list(torch.autograd.grad(total, leaves))


def require_same(function: Callable[[], tuple[Tensor, ...]], leaves: list[Tensor]) -> None:
    fused = function()
    with twice_differentiable():
        composed = function()
    for mine, other in zip(composed, fused, strict=True):
        assert torch.equal(mine, other) and len(mine.unique()) > 2
    for mine, other in zip(gradients(composed, leaves), gradients(fused, leaves), strict=True):
        assert bool(other.any())
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_weights_and_activations(bounds: tuple[int, int]) -> None:
    x, ties = draw(6, 4, 3, seed=1, scale=4), torch.arange(-9, 40).double().div(2).requires_grad_()
    step, channels = scalar(0.5), draw(4, 1, seed=2).detach().abs().add(0.3).requires_grad_()
    require_same(lambda: (quantize(x, step, *bounds),), [x, step])
    require_same(lambda: (quantize(x, channels, *bounds),), [x, channels])
    require_same(lambda: (round_clamp(ties, *bounds),), [ties])  # ties, and both ends exactly


@pytest.mark.parametrize("bounds", BOUNDS)
def test_normalize_quantize(bounds: tuple[int, int]) -> None:
    y, step = draw(6, 5, 4, 3, seed=1), scalar(1.6 / (bounds[1] - bounds[0]))
    norm = nn.BatchNorm2d(5, dtype=torch.float64)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(4))
    require_same(lambda: (normalize_quantize(y, norm, step, bounds),), [y, norm.weight, norm.bias, step])


@pytest.mark.parametrize("bounds", BOUNDS)
def test_scale_quantize(bounds: tuple[int, int]) -> None:
    accumulator, multiplier = draw(6, 5, 4, seed=2), draw(5, 1, seed=3, scale=bounds[1])
    require_same(lambda: (scale_quantize(accumulator, multiplier, bounds),), [accumulator, multiplier])


@pytest.mark.parametrize("shape", [(4, 3, 6, 5), (4, 3, 1, 1)])
@pytest.mark.parametrize("answered", [False, True])
def test_add_quantize(shape: tuple[int, ...], answered: bool) -> None:
    a = draw(4, 3, 6, 5, seed=5, scale=60).detach().round().requires_grad_()
    b = draw(*shape, seed=6, scale=60).detach().round().requires_grad_()
    scales, steps = [scalar(0.0157), scalar(0.0293)], [scalar(0.012), scalar(0.2)]
    bounds = [(-128, 127), (-8, 7)]

    def answers(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return tuple(((a + b) / n).round().clamp(-100, 100) for n in (2, 9))

    function = lambda: add_quantize(a, scales[0], b, scales[1], steps, bounds, answers if answered else None)  # noqa: E731
    require_same(function, [a, b, *scales, *steps])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("zero_point", "method"), [("fixed", "lsq"), ("learned", "lsq+"), ("fixed", "pact")])
def test_a_whole_network(training: bool, zero_point: str, method: str) -> None:
    """Both on live BatchNorm and deployed: the same logits, to the bit, and gradients of every parameter."""
    network = tiny_residual().eval()
    network.dropout.p = 0.0
    model = prepare(network, QuantConfig(weight_bits=3, act_bits=3, zero_point=zero_point), SPEC, method)
    calibrate(model, [images(32)])
    model.train(training)
    labels = torch.arange(24) % 4
    parameters = dict(model.named_parameters())

    def logits_and_gradients() -> tuple[Tensor, tuple[Tensor, ...]]:
        logits = model(images(24, seed=3))
        loss = F.cross_entropy(logits, labels)
        return logits, torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)

    fused = logits_and_gradients()
    with twice_differentiable():
        composed = logits_and_gradients()
    assert torch.equal(fused[0], composed[0])
    for name, mine, other in zip(parameters, composed[1], fused[1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-7, msg=name)


@pytest.mark.parametrize("function", [F.hardsigmoid, nn.Hardsigmoid(), torch.ops.aten.hardsigmoid.default])
def test_hard_sigmoids_have_a_second_derivative(function: Callable[[Tensor], Tensor]) -> None:
    """Of its square: 2 / 36 on the slope, 0 outside, in float64 but for rounding."""
    x = torch.linspace(-4, 4, 33, dtype=torch.float64).requires_grad_()
    with twice_differentiable():
        y = function(x)
    torch.testing.assert_close(y, function(x), rtol=1e-12, atol=1e-12)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    expected = (x.detach().abs() < 3).double() * (2 / 36)
    torch.testing.assert_close(second, expected, rtol=1e-12, atol=1e-12)


def test_it_ends_with_its_context() -> None:
    assert not composing()
    with pytest.raises(ValueError), twice_differentiable():
        with twice_differentiable():
            assert composing()
        assert composing()
        raise ValueError
    assert not composing()
