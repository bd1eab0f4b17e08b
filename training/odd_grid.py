"""The mid-rise grid as pure functions: odd codes, none of them 0, so that 2^bits levels lie evenly around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mecdeploy.training.composed import composing, straight_through
from mecdeploy.training.lsq import inner, zero_outside
from mecdeploy.training.quantizers import SMALLEST_STEP

CANDIDATES = 64


class _QuantizeOdd(torch.autograd.Function):
    """Regions: below (ratio <= -2^bits), above (ratio >= 2^bits), inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, bits: int) -> Tensor:
        ratio = x / step
        ctx.save_for_backward(ratio, step)
        ctx.edge = 1 << bits
        return _odd(ratio, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        ratio, step = ctx.saved_tensors
        grad_x = zero_outside(grads[0], ratio, -ctx.edge, ctx.edge).mul_(step.reciprocal())
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        along = (grad_x * ratio).sum_to_size(step.shape) if step.dim() else inner(grad_x, ratio)
        return grad_x, -along, None


def quantize_odd(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """Map reals to the odd codes -(2^bits - 1)..2^bits - 1: 2 * clamp(floor(x / (2 * step))) + 1.

    x: [...]; step: broadcasts to x, > 0, half the distance of two levels. A code stands for the reals from one step
    below to one step above it; 0 has the code 1. At 1 bit the codes are the signs.
    Gradients are straight-through, our own in the way of LSQ (arXiv:1902.08153): d codes/dx = 1/step and d codes/d step
    = -x/step^2 inside the outermost levels' own reach, |x| < 2^bits * step, and 0 outside. With real = codes * step
    they give code - x/step inside, at most 1, and the outermost code outside. The reach ends where rounding becomes
    clipping, one step beyond the outermost level, because at few bits half of all weights may lie beyond that level.
    """
    if composing():
        ratio, edge = x / step, 1 << bits
        return straight_through(ratio, -edge, edge, _odd(ratio.detach(), bits))
    codes: Tensor = _QuantizeOdd.apply(x, step, bits)
    return codes


@torch.no_grad()
def search_odd_steps(values: Tensor, bits: int) -> Tensor:
    """Step per row with the least mean square error of quantize_odd(x) * step, as CANDIDATES arrangements go.

    values: [rows, n]. The candidates' codes c are those of even fractions of the step whose reach ends at the largest
    value. With given codes the step (x . c) / (c . c) loses least, x . x - (x . c)^2 / (c . c); at 1 bit that is the
    mean of |x|, as Rastegari et al. 2016 (arXiv:1603.05279) derive for signs. Returns [rows], > 0: a row of zeros,
    which no code is, gets the smallest step.
    """
    reach = (values.abs().amax(1) / (1 << bits)).clamp_min(SMALLEST_STEP)
    best_gain, best_step = torch.full_like(reach, -1.0), reach
    for index in range(CANDIDATES, 0, -1):  # downwards: of equal errors, the step that clips least
        codes = _odd(values / (reach * (index / CANDIDATES))[:, None], bits)
        along, square = (values * codes).sum(1), codes.square().sum(1)
        gain = along.square() / square
        best_step = torch.where(gain > best_gain, along / square, best_step)
        best_gain = torch.maximum(gain, best_gain)
    return best_step.clamp_min(SMALLEST_STEP)


def _odd(ratio: Tensor, bits: int) -> Tensor:
    half = 1 << (bits - 1)
    return (ratio / 2).floor_().clamp_(-half, half - 1).mul_(2).add_(1)
