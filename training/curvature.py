"""The Hessian of a loss in weights: its products with vectors, and eigenvalue and trace from such products alone.

Products are exact (Pearlmutter 1994, "Fast exact multiplication by the Hessian"): the gradient is differentiated once
more, batch by batch, so that memory holds one batch. P is the number of all weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mecdeploy.training.data import Batch

TOLERANCE = 0.01
"""Residual, relative to the eigenvalue, at which power iteration ends: an eigenvalue then lies within 1% of it."""

Product = Callable[[Tensor], Tensor]


def filter_norms(weights: Sequence[Tensor]) -> Tensor:
    """The norm of each weight's own filter (the weights of one output), at that weight's place: [P], P = all weights.

    Source: Li et al. 2018 (arXiv:1712.09913), sec. 4, who scale random directions so.
    """
    norms = [
        weight.detach().flatten(1).norm(dim=1, keepdim=True).expand(len(weight), weight[0].numel())
        for weight in weights
    ]
    return torch.cat([norm.reshape(-1) for norm in norms])


class MeanLoss:
    """The mean cross entropy over batches as a function of a network's weights.

    logits: uint8 [m, C, H, W] to [m, classes], differentiable twice in the weights.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], weights: Sequence[Tensor], batches: Sequence[Batch]) -> None:
        self._logits, self._weights, self._batches = logits, weights, batches
        self._images = sum(len(batch.labels) for batch in batches)

    def gradient(self) -> tuple[float, Tensor]:
        """The loss in nats, and its gradient [P]."""
        total, gradient = 0.0, torch.zeros(())
        for batch in self._batches:
            loss = self._of(batch)
            gradient = gradient.to(loss.device) + _flat(
                torch.autograd.grad(loss, self._weights, materialize_grads=True)
            )
            total += float(loss.detach())
        return total, gradient

    def hessian_product(self, direction: Tensor) -> Tensor:
        """H v for a direction v [P]: [P]."""
        parts = torch.split(direction, [weight.numel() for weight in self._weights])
        pieces = [part.view(weight.shape) for part, weight in zip(parts, self._weights, strict=True)]
        total = torch.zeros_like(direction)
        for batch in self._batches:
            gradients = torch.autograd.grad(self._of(batch), self._weights, create_graph=True, materialize_grads=True)
            along = torch.stack([(g * v).sum() for g, v in zip(gradients, pieces, strict=True)]).sum()
            total += _flat(torch.autograd.grad(along, self._weights, materialize_grads=True))
        return total

    def gradient_energy(self) -> Tensor:
        """The squared norm of the first two images' gradient, [], to be differentiated once more."""
        first = self._batches[0]
        part = self._of(Batch((first.images[0][:2],), first.labels[:2]))
        gradients = torch.autograd.grad(part, self._weights, create_graph=True, materialize_grads=True)
        return torch.stack([gradient.square().sum() for gradient in gradients]).sum()

    def _of(self, batch: Batch) -> Tensor:
        """This batch's part of the mean."""
        return F.cross_entropy(self._logits(batch.images[0]), batch.labels, reduction="sum") / self._images


def top_eigenvalue(
    product: Product, start: Tensor, *, iterations: int, progress: Callable[[int], None] = lambda done: None
) -> tuple[float, float, int]:
    """Power iteration from a direction [P]: the eigenvalue of largest magnitude, its residual, iterations done.

    The eigenvalue is the Rayleigh quotient v H v. Ends early once the residual |H v - eigenvalue v| is within
    TOLERANCE of the eigenvalue, or H v is 0.
    """
    direction = start / start.double().norm().to(start)
    eigenvalue = residual = 0.0
    for done in range(1, iterations + 1):
        image = product(direction)
        eigenvalue = float(direction.double() @ image.double())
        residual = float((image.double() - eigenvalue * direction.double()).norm())
        progress(done)
        if residual <= TOLERANCE * abs(eigenvalue):
            return eigenvalue, residual, done
        direction = (image.double() / image.double().norm()).to(start)
    return eigenvalue, residual, iterations


def rademacher(count: int, generator: torch.Generator) -> Tensor:
    """Signs +-1, [count] float32, on the CPU, so that every device draws the same."""
    return torch.randint(0, 2, (count,), generator=generator).float() * 2 - 1


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean of two values or more, and its standard error."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return float(numbers.mean()), float(numbers.std(unbiased=True)) / math.sqrt(len(values))


def trace(
    product: Product,
    like: Tensor,
    *,
    probes: int,
    generator: torch.Generator,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[float, float]:
    """The trace by Hutchinson's estimate, the mean of z H z over signs z, and its standard error.

    like: [P], of the type and on the device that product takes. probes: at least 2.
    Source: Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix".
    """
    found = []
    for done in range(1, probes + 1):
        signs = rademacher(len(like), generator).to(like)
        found.append(float(signs.double() @ product(signs).double()))
        progress(done)
    return mean_and_error(found)


def _flat(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat([piece.detach().reshape(-1) for piece in pieces])
