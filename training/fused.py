"""Quantisation in one piece with the sum or product before it, so that a step costs little more than in full precision.

Composed of torch's own functions each would keep several float tensors for its backward pass, and run over all of
them. These keep what is there anyway, and what is small, and compute the rest again. Gradients are LSQ's, as `quantize`
has them (Esser et al. 2020, arXiv:1902.08153, eq. 3 and 5): with z = real / step, codes = clamp(round(z), lower, upper)
pass the gradient of z where lower < z < upper, and z in its turn depends on the step. How that is arranged is our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mecdeploy.training import composed
from mecdeploy.training.batch_moments import batch_moments
from mecdeploy.training.composed import Bounds
from mecdeploy.training.lsq import inner, zero_outside


def round_clamp_(ratio: Tensor, bounds: Bounds) -> Tensor:
    """clamp(round(ratio)) written over ratio, rounding half to even."""
    return ratio.round_().clamp_(*bounds)


def zero_outside_(grad: Tensor, ratio: Tensor, bounds: Bounds) -> Tensor:
    """The gradient where lower < ratio < upper, else 0, written over ratio."""
    kept: Tensor = torch.ops.aten.hardtanh_backward.grad_input(grad, ratio, *bounds, grad_input=ratio)
    return kept


class _NormalizeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
        bounds: Bounds,
    ) -> Tensor:
        ctx.moments = batch_moments()
        z, mean, deviation = ctx.moments.forward(y, weight, bias, running, momentum, eps)
        ctx.save_for_backward(y, weight, bias, mean, deviation)
        ctx.eps, ctx.bounds = eps, bounds
        return round_clamp_(z, bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        y, weight, bias, mean, inverse_deviation = ctx.saved_tensors
        shape = (1, -1, *[1] * (y.dim() - 2))
        gain = weight * inverse_deviation
        z = torch.addcmul((bias - mean * gain).view(shape), y, gain.view(shape))
        kept = zero_outside_(grads[0], z, ctx.bounds)
        found = ctx.moments.backward(kept, y, weight, mean, inverse_deviation, ctx.eps)
        return *found, None, None, None, None


def normalize_quantize(
    y: Tensor, norm: torch.nn.BatchNorm1d | torch.nn.BatchNorm2d, step: Tensor, bounds: Bounds
) -> Tensor:
    """Codes of BatchNorm with batch statistics, quantised: clamp(round(BN(y) / step)), [N, C, ...] like y.

    norm: the BatchNorm, whose gamma is used as |gamma| and whose running statistics are updated. step: ().
    The step divides gamma and beta, not the whole tensor: BN(y; gamma, beta) / step = BN(y; gamma / step, beta / step).
    So its gradient comes out of the two sums a channel that BatchNorm's backward pass takes anyway. Only y is kept.
    """
    running = (norm.running_mean, norm.running_var)
    momentum = 0.1 if norm.momentum is None else norm.momentum
    weight, bias = norm.weight.abs() / step, norm.bias / step
    if composed.composing():
        return composed.normalize_quantize(y, weight, bias, running, momentum, norm.eps, bounds)
    codes: Tensor = _NormalizeQuantize.apply(y, weight, bias, running, momentum, norm.eps, bounds)
    return codes


class _ScaleQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, accumulator: Tensor, multiplier: Tensor, bounds: Bounds) -> Tensor:
        ctx.save_for_backward(accumulator, multiplier)
        ctx.bounds = bounds
        return round_clamp_(accumulator * multiplier, bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        accumulator, multiplier = ctx.saved_tensors
        kept = zero_outside_(grads[0], accumulator * multiplier, ctx.bounds)
        of_multiplier = (kept * accumulator).sum_to_size(multiplier.shape) if ctx.needs_input_grad[1] else None
        return kept.mul_(multiplier), of_multiplier, None


def scale_quantize(accumulator: Tensor, multiplier: Tensor, bounds: Bounds) -> Tensor:
    """clamp(round(accumulator * multiplier)), float32 [N, ...]; multiplier broadcasts. Only the accumulator is kept."""
    if composed.composing():
        return composed.straight_through(accumulator * multiplier, *bounds)
    codes: Tensor = _ScaleQuantize.apply(accumulator, multiplier, bounds)
    return codes


class _AddQuantize(torch.autograd.Function):
    """Everything is counted in steps of the first output, z = a * scale_a / step + b * scale_b / step."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        scale_a: Tensor,
        b: Tensor,
        scale_b: Tensor,
        answers: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None,
        bounds: Sequence[Bounds],
        *steps: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(a, b, scale_a, scale_b, *steps)
        ctx.bounds = bounds
        if answers is not None:
            return answers(a, b)
        z = _weighted_sum(a, scale_a / steps[0], b, scale_b / steps[0])
        others = [
            round_clamp_(z * (steps[0] / step), limits) for step, limits in zip(steps[1:], bounds[1:], strict=True)
        ]
        return round_clamp_(z, bounds[0]), *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        a, b, scale_a, scale_b, *steps = ctx.saved_tensors
        z = _weighted_sum(a, scale_a / steps[0], b, scale_b / steps[0])
        of_z = zero_outside(grads[0], z, *ctx.bounds[0])
        of_steps = [-inner(of_z, z) / steps[0]]
        for grad, step, limits in zip(grads[1:], steps[1:], ctx.bounds[1:], strict=True):
            ratio = steps[0] / step
            other = zero_outside_(grad, z * ratio, limits)
            of_steps.append(-inner(other, z) * ratio / step)
            of_z.addcmul_(other, ratio)
        of_scale_a, of_scale_b = (inner(of_z, codes.expand_as(of_z)) / steps[0] for codes in (a, b))
        of_a = z.copy_(of_z).mul_(scale_a / steps[0]).sum_to_size(a.shape)
        of_b = of_z.mul_(scale_b / steps[0]).sum_to_size(b.shape)
        return of_a, of_scale_a, of_b, of_scale_b, None, None, *of_steps


def _weighted_sum(a: Tensor, factor_a: Tensor, b: Tensor, factor_b: Tensor) -> Tensor:
    if a.shape == b.shape:
        return (a * factor_a).addcmul_(b, factor_b)
    return torch.addcmul(a * factor_a, b, factor_b)


def add_quantize(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    steps: Sequence[Tensor],
    bounds: Sequence[Bounds],
    answers: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None = None,
) -> tuple[Tensor, ...]:
    """Codes of one sum for each reader: clamp(round((a * scale_a + b * scale_b) / step)).

    a, b: centred codes [N, ...] that broadcast to each other; the backward pass keeps nothing else. scales, steps: ().
    answers: an integer kernel's codes from a and b, one tensor for each reader, instead; the gradients are the same.
    """
    if composed.composing():
        return composed.add_quantize(a, scale_a, b, scale_b, steps, bounds, answers)
    codes: tuple[Tensor, ...] = _AddQuantize.apply(a, scale_a, b, scale_b, answers, bounds, *steps)
    return codes


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a table [n] at an int32 index that was just computed: it lies densely, and the result lies as it."""
    found = table.index_select(0, index.as_strided((index.numel(),), (1,)))
    return found.as_strided(index.shape, index.stride())
