"""A quantised activation, and the module that holds its learned step size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mecdeploy.training.composed import Bounds
from mecdeploy.training.fused import add_quantize, normalize_quantize, scale_quantize
from mecdeploy.training.lsq import clamp_scaling_gradient, quantize, round_clamp, scale_gradient

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


class ActivationQuantizer(nn.Module):
    """Per-tensor learned step size of one activation, stored as uint8 codes qmin..2^bits - 1.

    signed: for values of both signs. zero_point is then 2^(bits - 1), or learned; otherwise it is 0, which is also the
    ReLU. rectified: the values are a ReLU's though the quantiser is signed, since it is shared: qmin is zero_point.
    maximum: largest real the activation takes (6 for ReLU6), or None. It bounds the step, so the clip stays below it.
    offset: where learn_zero_point, how far the lowest code lies below real 0, () in reals; the zero point is offset /
    step, rounded: LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576) learns that offset too, but leaves it unrounded. A whole
    number of steps keeps a code for real 0, so that padding stays exact.
    pact: the step learns by PACT (Choi et al. 2018, arXiv:1805.06085, eq. 1-3) where values have one sign; a signed
    quantiser stays LSQ's, as PACT has no form for both signs. PACT learns the clipping level alpha = step * qmax by
    d real / d alpha = 1 where x >= alpha, else 0. With g the sum of d loss / d real there, d loss / d step is g * qmax.
    SGD with decay has alpha' = alpha - lr * (g + decay * alpha); divided by qmax, step' = step - lr * (g / qmax +
    decay * step). So the gradient of step times 1 / qmax^2, with plain decay of step, is PACT's update (momentum is
    linear in both). The derivation is ours.
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool,
        rectified: bool = False,
        maximum: float | None = None,
        learn_zero_point: bool = False,
        pact: bool = False,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.signed, self.rectified = signed, rectified
        self.maximum = maximum
        self.pact = pact and not signed
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
    def bounds(self) -> Bounds:
        """Smallest and largest centred code."""
        zero_point = self.zero_point
        return self.qmin - zero_point, self.qmax - zero_point

    @property
    def largest_step(self) -> float:
        """The step at which the largest code reaches `maximum`."""
        return float("inf") if self.maximum is None else self.maximum / max(1, self.qmax - self.zero_point)

    def effective_step(self, features: int | None = None) -> Tensor:
        """The step in use, () float32 > 0; features: elements per sample, for LSQ's gradient scale."""
        factor = 1.0 if features is None else self._gradient_scale(features)
        return clamp_scaling_gradient(self.step, SMALLEST_STEP, self.largest_step, factor)

    def forward(self, x: Tensor) -> QTensor:
        """Quantise reals [N, ...]."""
        if self.samples is not None:
            return self._observe(x)
        step = self.effective_step(x[0].numel())
        codes = quantize(x, step, *self.bounds)
        return self.followed(codes, lambda: x.detach() / step.detach(), step)

    def normalized(self, y: Tensor, norm: nn.BatchNorm2d | nn.BatchNorm1d) -> QTensor:
        """Quantise BatchNorm(y) with batch statistics and |gamma|, [N, C, ...], updating the running statistics."""
        if self.samples is not None or self.offset is not None or self.pact:
            return self.forward(batch_norm(y, norm))
        step = self.effective_step(y[0].numel())
        return self.tensor(normalize_quantize(y, norm, step, self.bounds), step)

    def from_product(self, factor: Tensor, multiplier: Tensor, step: Tensor) -> QTensor:
        """Quantise real / step = factor * multiplier, as the deployed kernel computes it; float32 [N, ...]."""
        codes = scale_quantize(factor, multiplier, self.bounds)
        return self.followed(codes, lambda: (factor * multiplier).detach(), step)

    def from_ratio(self, ratio: Tensor, step: Tensor) -> QTensor:
        """Quantise `ratio` = real / step, already computed as the deployed kernel computes it, [N, ...]."""
        return self.followed(round_clamp(ratio, *self.bounds), ratio.detach, step)

    def from_stored(self, stored: Tensor, step: Tensor) -> QTensor:
        """Quantise a stored code not yet rounded, real / step + zero_point as the deployed kernel computes it."""
        zero_point = self.zero_point
        codes = round_clamp(stored, self.qmin, self.qmax) - zero_point
        return self.followed(codes, lambda: stored.detach() - zero_point, step)

    def tensor(self, codes: Tensor, step: Tensor) -> QTensor:
        """Centred codes under this quantisation."""
        return QTensor(codes, step, self.zero_point, self.qmax, self.qmin)

    def _gradient_scale(self, features: int) -> float:
        if self.pact:
            return float(self.qmax) ** -2
        return float((features * max(1, self.qmax - self.zero_point)) ** -0.5)

    def followed(self, codes: Tensor, real_in_steps: Callable[[], Tensor], step: Tensor) -> QTensor:
        """Codes under this quantisation, with what gradients owe to a learned offset, or to PACT.

        An offset and the step learn that they move both ends of the range. With real = codes * step, as LSQ+ eq. 8 and
        9: outside the range d real / d offset is -1, and d real / d step is 0 below it and qmax above it; inside all is
        as with a fixed zero point. PACT's step has no gradient inside the range: LSQ's, codes - ratio, is taken back by
        a term whose value is 0.
        """
        if self.pact and step.requires_grad and torch.is_grad_enabled():
            ratio, fixed = real_in_steps(), step.detach()
            inside = (ratio > 0) & (ratio < self.qmax)
            owed = torch.where(inside, ratio - codes.detach(), 0.0)
            return self.tensor(codes + owed * ((step - fixed) / fixed), step)
        if self.offset is None or not self.offset.requires_grad or not torch.is_grad_enabled():
            return self.tensor(codes, step)
        zero_point, ratio = self.zero_point, real_in_steps()
        outside = (ratio >= self.qmax - zero_point) | ((ratio <= -zero_point) & (not self.rectified))
        offset = scale_gradient(self.offset, self._gradient_scale(codes[0].numel()))
        zero = offset / step
        return self.tensor(codes - outside * (zero - zero.detach()), step)

    def _observe(self, x: Tensor) -> QTensor:
        """Calibration: pass the float activation on and keep it."""
        assert self.samples is not None
        x = x if self.signed and not self.rectified else x.clamp(0.0, self.maximum)
        stride = max(1, x.numel() // SAMPLES_PER_BATCH) | 1
        self.samples.append(x.detach().flatten()[::stride])
        return self.tensor(x, x.new_ones(()))


def batch_norm(y: Tensor, norm: nn.BatchNorm2d | nn.BatchNorm1d) -> Tensor:
    """BatchNorm in training with gamma kept positive, updating the running statistics."""
    return nn.functional.batch_norm(
        y,
        norm.running_mean,
        norm.running_var,
        norm.weight.abs(),
        norm.bias,
        training=True,
        momentum=0.1 if norm.momentum is None else norm.momentum,
        eps=norm.eps,
    )


def add(
    a: QTensor,
    b: QTensor,
    outputs: Sequence[ActivationQuantizer],
    answers: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None = None,
) -> tuple[QTensor, ...]:
    """Quantise one sum once for each output; shapes broadcast. answers: of a kernel, as add_quantize takes them."""
    shape: torch.Size = torch.broadcast_shapes(a.codes.shape, b.codes.shape)  # type: ignore[no-untyped-call]
    features = shape[1:].numel()
    steps = [output.effective_step(features) for output in outputs]
    codes = add_quantize(
        a.codes,
        a.scale,
        b.codes,
        b.scale,
        steps,
        [output.bounds for output in outputs],
        answers,
    )

    def in_steps(step: Tensor) -> Callable[[], Tensor]:
        return lambda: ((a.dequantize() + b.dequantize()) / step).detach()

    return tuple(o.followed(found, in_steps(step), step) for o, found, step in zip(outputs, codes, steps, strict=True))
