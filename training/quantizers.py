"""Learned step size quantisation (LSQ): pure functions, and the two modules that hold a step size.

Everything works on *codes*, the integers that run: `real = codes * step`. Passing codes and step separately lets the
gradient of the step assemble itself from the two places where a step acts, and lets a convolution run on integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST_STEP = 1e-12
SAMPLES_PER_BATCH = 16_384
"""Values of one batch that calibration keeps; the stride is odd, so that it walks over all rows and channels."""


@dataclass(frozen=True)
class QTensor:
    """A quantised activation: real = codes * scale.

    codes: [N, ...] float32 holding integers, centred (the stored uint8 code minus zero_point), in lower..upper.
    scale: () float32, real units per integer step. zero_point, qmax, qmin: the stored codes are qmin..qmax.
    """

    codes: Tensor
    scale: Tensor
    zero_point: int
    qmax: int
    qmin: int = 0

    @property
    def lower(self) -> int:
        """Smallest centred code."""
        return self.qmin - self.zero_point

    @property
    def upper(self) -> int:
        """Largest centred code."""
        return self.qmax - self.zero_point

    def dequantize(self) -> Tensor:
        """The real values, [N, ...]."""
        return self.codes * self.scale

    def stored(self) -> Tensor:
        """The uint8 codes as the deployed model stores them, [N, ...]."""
        return (self.codes + self.zero_point).to(torch.uint8)

    def with_codes(self, codes: Tensor) -> QTensor:
        """The same quantisation around other codes."""
        return QTensor(codes, self.scale, self.zero_point, self.qmax, self.qmin)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class _ClampPassingGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lower: float, upper: float) -> Tensor:
        return x.clamp(lower, upper)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


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
        grad_x = _zero_outside(grads[0], ratio, ctx.lower, ctx.upper).mul_(step.reciprocal())
        grad_step = -(grad_x * ratio).sum_to_size(step.shape) if ctx.needs_input_grad[1] else None
        return grad_x, grad_step, None, None


class _RoundClamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ratio: Tensor, lower: int, upper: int) -> Tensor:
        ctx.save_for_backward(ratio)
        ctx.lower, ctx.upper = lower, upper
        return torch.round(ratio).clamp_(lower, upper)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (ratio,) = ctx.saved_tensors
        return _zero_outside(grads[0], ratio, ctx.lower, ctx.upper), None, None


def _zero_outside(grad: Tensor, ratio: Tensor, lower: int, upper: int) -> Tensor:
    """The gradient where lower < ratio < upper, else 0: one pass, no mask in memory."""
    kept: Tensor = torch.ops.aten.hardtanh_backward(grad, ratio, lower, upper)
    return kept


def quantize(x: Tensor, step: Tensor, lower: int, upper: int) -> Tensor:
    """Map reals to centred codes: clamp(round(x / step), lower, upper).

    Rounds half to even and divides (no reciprocal), as ONNX QuantizeLinear does. x: [...]; step: broadcasts to x, > 0.
    Gradients are straight-through: d codes/dx = 1/step and d codes/d step = -x/step^2 inside the range, 0 outside. With
    real = codes * step they give LSQ's round(x/step) - x/step inside, lower or upper outside.
    Source: Esser et al. 2020 (arXiv:1902.08153), eq. 1-3 and 5.
    """
    codes: Tensor = _Quantize.apply(x, step, lower, upper)
    return codes


def round_clamp(ratio: Tensor, lower: int, upper: int) -> Tensor:
    """clamp(round(ratio), lower, upper), rounding half to even; the gradient passes strictly inside the range."""
    codes: Tensor = _RoundClamp.apply(ratio, lower, upper)
    return codes


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged (straight-through; Bengio et al. 2013, arXiv:1308.3432)."""
    return x + (torch.round(x) - x).detach() if x.requires_grad else torch.round(x)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """X itself; its gradient times factor (LSQ sec. 2.2 uses 1 / sqrt(N * upper))."""
    scaled: Tensor = _ScaleGradient.apply(x, factor)
    return scaled


def clamp_passing_gradient(x: Tensor, lower: float, upper: float) -> Tensor:
    """clamp(x, lower, upper) whose gradient passes everywhere, so that a bounded step can come back."""
    clamped: Tensor = _ClampPassingGradient.apply(x, lower, upper)
    return clamped


def fake_quantize(x: Tensor, step: Tensor, lower: int, upper: int) -> Tensor:
    """Float to float: quantize(x) * step, [...] like x."""
    return quantize(x, step, lower, upper) * step


class ActivationQuantizer(nn.Module):
    """Per-tensor learned step size of one activation, stored as uint8 codes qmin..2^bits - 1.

    signed: for values of both signs. zero_point is then 2^(bits - 1), or learned; otherwise it is 0, which is also the
    ReLU. rectified: the values are a ReLU's though the quantiser is signed, since it is shared: qmin is zero_point.
    maximum: largest real the activation takes (6 for ReLU6), or None. It bounds the step, so the clip stays below it.
    offset: where learn_zero_point, how far the lowest code lies below real 0, () in reals; the zero point is offset /
    step, rounded: LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576) learns that offset too, but leaves it unrounded. A whole
    number of steps keeps a code for real 0, so that padding stays exact.
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool,
        rectified: bool = False,
        maximum: float | None = None,
        learn_zero_point: bool = False,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.signed, self.rectified = signed, rectified
        self.maximum = maximum
        self.step = nn.Parameter(torch.ones(()))
        self.offset = nn.Parameter(torch.tensor(float(1 << (bits - 1)))) if signed and learn_zero_point else None
        self.samples: list[Tensor] | None = None

    def share(self, other: ActivationQuantizer) -> None:
        """Learn the step and zero point of `other` from now on, so that both kinds of codes can lie side by side."""
        self.step, self.offset = other.step, other.offset

    @property
    def zero_point(self) -> int:
        """Stored code of real zero."""
        if self.offset is not None:
            step = self.step.detach().clamp(SMALLEST_STEP)
            return min(self.qmax, max(0, round(float(self.offset.detach() / step))))
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest stored code."""
        return (1 << self.bits) - 1

    @property
    def qmin(self) -> int:
        """Smallest stored code."""
        return self.zero_point if self.rectified else 0

    @property
    def largest_step(self) -> float:
        """The step at which the largest code reaches `maximum`."""
        return float("inf") if self.maximum is None else self.maximum / max(1, self.qmax - self.zero_point)

    def effective_step(self, features: int | None = None) -> Tensor:
        """The step in use, () float32 > 0; features: elements per sample, for LSQ's gradient scale."""
        step = clamp_passing_gradient(self.step, SMALLEST_STEP, self.largest_step)
        return step if features is None else scale_gradient(step, self._gradient_scale(features))

    def forward(self, x: Tensor) -> QTensor:
        """Quantise reals [N, ...]."""
        if self.samples is not None:
            return self._observe(x)
        step = self.effective_step(x[0].numel())
        zero_point = self.zero_point
        lower, upper = self.qmin - zero_point, self.qmax - zero_point
        codes = quantize(x, step, lower, upper)
        return self.tensor(self._follow_zero(codes, lambda: x.detach() / step.detach(), step), step)

    def from_ratio(self, ratio: Tensor, step: Tensor) -> QTensor:
        """Quantise `ratio` = real / step, already computed as the deployed kernel computes it, [N, ...]."""
        zero_point = self.zero_point
        codes = round_clamp(ratio, self.qmin - zero_point, self.qmax - zero_point)
        return self.tensor(self._follow_zero(codes, ratio.detach, step), step)

    def from_stored(self, stored: Tensor, step: Tensor) -> QTensor:
        """Quantise a stored code not yet rounded, real / step + zero_point as the deployed kernel computes it."""
        zero_point = self.zero_point
        codes = round_clamp(stored, self.qmin, self.qmax) - zero_point
        return self.tensor(self._follow_zero(codes, lambda: stored.detach() - zero_point, step), step)

    def tensor(self, codes: Tensor, step: Tensor) -> QTensor:
        """Centred codes under this quantisation."""
        return QTensor(codes, step, self.zero_point, self.qmax, self.qmin)

    def _gradient_scale(self, features: int) -> float:
        return float((features * max(1, self.qmax - self.zero_point)) ** -0.5)

    def _follow_zero(self, codes: Tensor, real_in_steps: Callable[[], Tensor], step: Tensor) -> Tensor:
        """The same codes, through which offset and step learn that they move both ends of the range.

        With real = codes * step, as LSQ+ eq. 8 and 9: outside the range d real / d offset is -1, and d real / d step is
        0 below it and qmax above it; inside all is as with a fixed zero point.
        """
        if self.offset is None or not self.offset.requires_grad or not torch.is_grad_enabled():
            return codes
        zero_point, ratio = self.zero_point, real_in_steps()
        outside = (ratio >= self.qmax - zero_point) | ((ratio <= -zero_point) & (not self.rectified))
        offset = scale_gradient(self.offset, self._gradient_scale(codes[0].numel()))
        zero = offset / step
        return codes - outside * (zero - zero.detach())

    def _observe(self, x: Tensor) -> QTensor:
        """Calibration: pass the float activation on and keep it."""
        assert self.samples is not None
        x = x if self.signed and not self.rectified else x.clamp(0.0, self.maximum)
        stride = max(1, x.numel() // SAMPLES_PER_BATCH) | 1
        self.samples.append(x.detach().flatten()[::stride])
        return self.tensor(x, x.new_ones(()))


class WeightQuantizer(nn.Module):
    """Per-output-channel learned step size of a weight [O, ...]: symmetric, zero_point 0, codes -2^(b-1)..2^(b-1)-1."""

    def __init__(self, bits: int, channels: int) -> None:
        super().__init__()
        self.bits = bits
        self.step = nn.Parameter(torch.ones(channels))

    @property
    def lower(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def upper(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [O, ...] and step [O]."""
        step = clamp_passing_gradient(self.step, SMALLEST_STEP, float("inf"))
        step = scale_gradient(step, (weight[0].numel() * self.upper) ** -0.5)
        return quantize(weight, step.view(-1, *[1] * (weight.dim() - 1)), self.lower, self.upper), step
