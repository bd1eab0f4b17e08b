"""Quantisation written in torch's own functions, which differentiate as often as one likes.

The functions of `lsq` and `fused` differentiate once, for the sake of memory and time. Inside `twice_differentiable`
they compute the same codes and first gradients by the expressions of this file, so that differentiating a gradient
gives the straight-through estimator's own second derivatives: those of the network in which every rounding residual,
and which values are clipped, stays as it is. docs/measures.md says what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Bounds = tuple[int, int]
"""Smallest and largest centred code."""

_active = False


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """While active, forward passes build graphs of the composed form; their gradients may be taken after it, too."""
    global _active
    before, _active = _active, True
    try:
        with _PiecewiseLinear():
            yield
    finally:
        _active = before


class _PiecewiseLinear(TorchFunctionMode):
    """Computes the hard sigmoid, for which torch has no second derivative, by functions for which it has one."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace F.hardsigmoid and the operator behind it, leave the rest alone."""
        if function in (F.hardsigmoid, torch.ops.aten.hardsigmoid.default):
            return F.relu6(args[0] + 3) / 6
        return function(*args, **(kwargs or {}))


def composing() -> bool:
    """Whether the composed form is in force."""
    return _active


def straight_through(ratio: Tensor, lower: int, upper: int, codes: Tensor | None = None) -> Tensor:
    """clamp(round(ratio), lower, upper), or given codes; d codes / d ratio is 1 where lower < ratio < upper, else 0.

    The codes are exact: what is added to them is ratio - ratio, which is 0.
    Source: Bengio et al. 2013 (arXiv:1308.3432); the regions are LSQ's (Esser et al. 2020, arXiv:1902.08153, eq. 3).
    """
    fixed = ratio.detach()
    if codes is None:
        codes = torch.round(fixed).clamp_(lower, upper)
    inside = (fixed > lower) & (fixed < upper)
    return codes + (ratio - fixed) * inside


def normalize_quantize(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    momentum: float,
    eps: float,
    bounds: Bounds,
) -> Tensor:
    """Codes of BatchNorm(y) with batch statistics, [N, C, ...]; weight and bias: [C], in steps."""
    z: Tensor = torch.native_batch_norm(y, weight, bias, *running, True, momentum, eps)[0]
    return straight_through(z, *bounds)


def add_quantize(
    a: Tensor,
    scale_a: Tensor,
    b: Tensor,
    scale_b: Tensor,
    steps: Sequence[Tensor],
    bounds: Sequence[Bounds],
    answers: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None,
) -> tuple[Tensor, ...]:
    """Codes of one sum for each reader, in the arithmetic of fused.add_quantize, whose arguments these are."""
    z = torch.addcmul(a * (scale_a / steps[0]), b, scale_b / steps[0])
    ratios = [z, *(z * (steps[0] / step) for step in steps[1:])]
    codes: Sequence[Tensor | None] = [None] * len(steps)
    if answers is not None:
        with torch.no_grad():
            codes = answers(a, b)
    return tuple(
        straight_through(ratio, *limits, given) for ratio, limits, given in zip(ratios, bounds, codes, strict=True)
    )
