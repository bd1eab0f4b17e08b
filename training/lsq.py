"""Learned step size quantisation (LSQ) as pure functions of float tensors.

Everything works on *codes*, the integers that run: `real = codes * step`. Passing codes and step separately lets the
gradient of the step assemble itself from the two places where a step acts, and lets a convolution run on integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mecdeploy.training.composed import composing, straight_through


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float | Tensor) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class _ClampScalingGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lower: float, upper: float, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clamp(lower, upper)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0] * ctx.factor, None, None, None


class _Quantize(torch.autograd.Function):
    """Regions of LSQ eq. 3 and 5: below (ratio <= lower), above (ratio >= upper), inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, lower: int, upper: int) -> Tensor:
        ratio = x / step
        ctx.save_for_backward(ratio, step)
        ctx.lower, ctx.upper = lower, upper
        return torch.round(ratio).clamp_(lower, upper)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        ratio, step = ctx.saved_tensors
        grad_x = zero_outside(grads[0], ratio, ctx.lower, ctx.upper).mul_(step.reciprocal())
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None, None
        along = (grad_x * ratio).sum_to_size(step.shape) if step.dim() else inner(grad_x, ratio)
        return grad_x, -along, None, None


class _RoundClamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ratio: Tensor, lower: int, upper: int) -> Tensor:
        ctx.save_for_backward(ratio)
        ctx.lower, ctx.upper = lower, upper
        return torch.round(ratio).clamp_(lower, upper)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (ratio,) = ctx.saved_tensors
        return zero_outside(grads[0], ratio, ctx.lower, ctx.upper), None, None


def zero_outside(grad: Tensor, ratio: Tensor, lower: int, upper: int) -> Tensor:
    """The gradient where lower < ratio < upper, else 0: one pass, no mask in memory."""
    kept: Tensor = torch.ops.aten.hardtanh_backward(grad, ratio, lower, upper)
    return kept


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of all a * b, (); where both lie in memory alike, in one pass and without the product."""
    if a.shape == b.shape and a.stride() == b.stride() and dense(a):
        return torch.dot(a.as_strided((a.numel(),), (1,)), b.as_strided((b.numel(),), (1,)))
    return (a * b).sum()


def dense(x: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def quantize(x: Tensor, step: Tensor, lower: int, upper: int) -> Tensor:
    """Map reals to centred codes: clamp(round(x / step), lower, upper).

    Rounds half to even and divides (no reciprocal), as ONNX QuantizeLinear does. x: [...]; step: broadcasts to x, > 0.
    Gradients are straight-through: d codes/dx = 1/step and d codes/d step = -x/step^2 inside the range, 0 outside. With
    real = codes * step they give LSQ's round(x/step) - x/step inside, lower or upper outside.
    Source: Esser et al. 2020 (arXiv:1902.08153), eq. 1-3 and 5.
    """
    if composing():
        return straight_through(x / step, lower, upper)
    codes: Tensor = _Quantize.apply(x, step, lower, upper)
    return codes


def round_clamp(ratio: Tensor, lower: int, upper: int) -> Tensor:
    """clamp(round(ratio), lower, upper), rounding half to even; the gradient passes strictly inside the range."""
    if composing():
        return straight_through(ratio, lower, upper)
    codes: Tensor = _RoundClamp.apply(ratio, lower, upper)
    return codes


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged (straight-through; Bengio et al. 2013, arXiv:1308.3432)."""
    return x + (torch.round(x) - x).detach() if x.requires_grad else torch.round(x)


def scale_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """X itself; its gradient times factor."""
    scaled: Tensor = _ScaleGradient.apply(x, factor)
    return scaled


def clamp_scaling_gradient(x: Tensor, lower: float, upper: float, factor: float) -> Tensor:
    """clamp(x, lower, upper) whose gradient, times factor, passes everywhere, so that a bounded step can come back.

    LSQ sec. 2.2 uses the factor 1 / sqrt(N * upper).
    """
    clamped: Tensor = _ClampScalingGradient.apply(x, lower, upper, factor)
    return clamped


def fake_quantize(x: Tensor, step: Tensor, lower: int, upper: int) -> Tensor:
    """Float to float: quantize(x) * step, [...] like x."""
    return quantize(x, step, lower, upper) * step
