"""Fused quantisation against the same written in torch's own differentiable functions, in float64.

The witness has LSQ's straight-through rules as masks (test_quantizers.py checks those against the paper, case by case),
and everything else from autograd. Both compute in float64, so that they agree to its rounding over sums of some
thousand products: 1e-9.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training.fused import add_quantize, look_up, normalize_quantize, scale_quantize
from mecdeploy.training.lsq import inner

BOUNDS = [(0, 15), (-8, 7), (0, 255), (-2, 1)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def straight_through(z: Tensor, lower: int, upper: int) -> Tensor:
    """Codes of z whose gradient is that of z strictly inside the bounds, and nothing outside."""
    inside = (z > lower) & (z < upper)
    passed = z * inside
    return torch.round(z).clamp(lower, upper).detach() + (passed - passed.detach())


def draw(*shape: int, seed: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (values.to(memory_format=layout) if len(shape) == 4 else values).requires_grad_()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def require_same(
    fused: Callable[[], tuple[Tensor, ...]], witness: Callable[[], tuple[Tensor, ...]], leaves: list[Tensor]
) -> None:
    """Equal codes, and equal gradients of all leaves for one random direction; not all of them zero."""
    found, expected = fused(), witness()
    weights = [draw(*codes.shape, seed=90 + i).detach() for i, codes in enumerate(expected)]
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)
        assert len(mine.unique()) > 2
    gradients = [
        torch.autograd.grad(sum(((c * w).sum() for c, w in zip(codes, weights, strict=True)), torch.zeros(())), leaves)
        for codes in (found, expected)
    ]
    for mine, other in zip(*gradients, strict=True):
        assert bool(other.any())
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_normalize_quantize(bounds: tuple[int, int], layout: torch.memory_format) -> None:
    y = draw(6, 5, 4, 3, seed=1, layout=layout)
    step = scalar(1.6 / (bounds[1] - bounds[0]))
    norms = []
    for _ in range(2):
        norm = nn.BatchNorm2d(5, dtype=torch.float64, momentum=0.3)
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.5, -1.5, 2.0, 1.0, 0.3]))
            norm.bias.copy_(torch.tensor([0.1, 0.6, -0.4, 0.0, 0.2]))
        norms.append(norm)
    first, second = norms
    first.weight, first.bias = second.weight, second.bias

    def witness() -> tuple[Tensor, ...]:
        running = second.running_mean, second.running_var
        z = F.batch_norm(y, *running, second.weight.abs(), second.bias, True, 0.3, second.eps) / step
        return (straight_through(z, *bounds),)

    require_same(lambda: (normalize_quantize(y, first, step, bounds),), witness, [y, second.weight, second.bias, step])
    for name, buffer in first.named_buffers():
        if name != "num_batches_tracked":
            torch.testing.assert_close(buffer, second.get_buffer(name), rtol=1e-12, atol=0)
            assert not torch.equal(buffer, nn.BatchNorm2d(5, dtype=torch.float64).get_buffer(name))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_scale_quantize(bounds: tuple[int, int], layout: torch.memory_format) -> None:
    accumulator = draw(6, 5, 4, 3, seed=2, layout=layout)
    multiplier = (draw(5, 1, 1, seed=3).detach().abs() * bounds[1]).requires_grad_()
    require_same(
        lambda: (scale_quantize(accumulator, multiplier, bounds),),
        lambda: (straight_through(accumulator * multiplier, *bounds),),
        [accumulator, multiplier],
    )


@pytest.mark.parametrize(
    "shapes", [((4, 3, 6, 5),) * 2, ((4, 3, 6, 5), (4, 3, 1, 1)), ((4, 1, 1, 5), (4, 3, 6, 1)), ((), (4, 3, 6, 5))]
)
@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_add_quantize(layout: torch.memory_format, readers: int, shapes: tuple[tuple[int, ...], ...]) -> None:
    """One sum, read at several widths; shapes that broadcast either way."""
    codes = []
    for seed, (shape, reach) in enumerate(zip(shapes, (120.0, 80.0), strict=True), 5):
        values = (draw(*shape, seed=seed, layout=layout).detach() * reach).round().clamp(-128, 127)
        codes.append(values.requires_grad_())
    a, b = codes
    scales = [scalar(0.011 * 2**0.5), scalar(0.017 * 3**0.5)]  # no ties
    steps, bounds = [scalar(0.012), scalar(0.2), scalar(0.4)][:readers], [(0, 255), (0, 15), (-8, 7)][:readers]

    def witness() -> tuple[Tensor, ...]:
        total = a * scales[0] + b * scales[1]
        return tuple(straight_through(total / step, *limits) for step, limits in zip(steps, bounds, strict=True))

    require_same(lambda: add_quantize(a, scales[0], b, scales[1], steps, bounds), witness, [a, b, *scales, *steps])


def test_a_kernels_answers_replace_the_codes_and_not_the_gradients() -> None:
    a, b = (draw(4, 3, seed=seed).detach().mul(50).round().requires_grad_() for seed in (7, 8))
    scales, step, answer = [scalar(0.1), scalar(0.2)], scalar(0.3), torch.full((4, 3), 7.0, dtype=torch.float64)

    (plain,) = add_quantize(a, scales[0], b, scales[1], [step], [(-40, 40)])
    (answered,) = add_quantize(a, scales[0], b, scales[1], [step], [(-40, 40)], lambda a, b: (answer,))

    assert torch.equal(answered, answer) and not torch.equal(plain, answer)
    direction = draw(4, 3, seed=9).detach()
    leaves = [a, b, *scales, step]
    for mine, other in zip(
        torch.autograd.grad((answered * direction).sum(), leaves),
        torch.autograd.grad((plain * direction).sum(), leaves),
        strict=True,
    ):
        assert torch.equal(mine, other)


def test_little_is_kept_for_the_backward_pass() -> None:
    """What the README's memory figure rests on, in bytes: BatchNorm keeps its input alone, a sum its two addends."""
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    values = torch.randn(8, 4, 16, 16, requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        normalize_quantize(values, nn.BatchNorm2d(4), scale, (0, 15))
        assert sum(size for size in kept if size > 100) == 4 * values.numel()
        kept.clear()
        add_quantize(values, scale, values, scale, [scale, scale], [(0, 15), (0, 255)])
        assert sum(size for size in kept if size > 100) == 2 * 4 * values.numel()


def test_second_derivatives_are_refused_and_not_wrong() -> None:
    y, step = draw(4, 3, 2, 2, seed=1), scalar(0.1)
    codes = normalize_quantize(y, nn.BatchNorm2d(3, dtype=torch.float64), step, (0, 15))
    (gradient,) = torch.autograd.grad(codes.square().sum(), step, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_look_up_keeps_the_layout(layout: torch.memory_format) -> None:
    table = torch.arange(100, dtype=torch.float32) ** 2
    index = torch.randint(0, 100, (2, 3, 4, 5), dtype=torch.int32).to(memory_format=layout)
    found = look_up(table, index)
    assert torch.equal(found, index.float() ** 2)
    assert found.stride() == index.stride()


def test_inner_of_any_layouts() -> None:
    """Integers, so that any order of summation gives the same."""
    a = torch.arange(120.0).view(2, 3, 4, 5)
    b = a.flip(0)
    expected = float((a * b).sum())
    for first in (a, a.to(memory_format=torch.channels_last)):
        for second in (b, b.to(memory_format=torch.channels_last)):
            assert float(inner(first, second)) == expected
    assert float(inner(a[:, :2], b[:, :2])) == float((a[:, :2] * b[:, :2]).sum())
    assert float(inner(a[:1].expand(2, 3, 4, 5), b)) == float((a[:1] * b).sum())
