"""How sharp the minimum is that training found: top eigenvalue and trace of the loss's Hessian in the layers' weights.

The loss is the mean cross entropy over given images, of the network in evaluation mode: BatchNorm with its running
statistics, quantised networks in the deployed arithmetic, with straight-through derivatives (`composed`).
docs/measures.md defines every number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mecdeploy.training.composed import twice_differentiable
from mecdeploy.training.curvature import TOLERANCE, MeanLoss, Product, filter_norms, top_eigenvalue, trace
from mecdeploy.training.data import Batch
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.units import WeightedUnit

BATCH_SIZE = 64
"""Smaller than in training: a graph of first and second derivatives is larger. Changes a result's last bits alone."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Of one Hessian H, in nats over squared units of its coordinates.

    eigenvalue: the one of largest magnitude, with its sign. residual: |H v - eigenvalue v| for the unit vector v found;
    some eigenvalue lies that close. converged: whether it is within TOLERANCE of |eigenvalue|, after `iterations`.
    trace, trace_error: Hutchinson's estimate, and its standard error.
    """

    eigenvalue: float
    residual: float
    iterations: int
    converged: bool
    trace: float
    trace_error: float


@dataclass(frozen=True, kw_only=True)
class Flatness:
    """What was measured. weights: how many coordinates. loss: nats. gradient_norm: of the loss in these coordinates.

    raw: in the weights themselves. normalized: in weights relative to the norm of their filter, which no rescaling of a
    filter that BatchNorm undoes can change.
    """

    weights: int
    loss: float
    gradient_norm: float
    raw: Curvature
    normalized: Curvature


def layer_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that flatness is measured in, by name: weights of convolutions and linear layers.

    Not biases, BatchNorm's gamma and beta, step sizes and zero points. Of a network in full precision, and of float
    islands, those are the parameters called weight (or *_weight) of two or more dimensions.
    """
    if isinstance(network, QuantizedModel):
        found: dict[str, nn.Parameter] = {}
        for name, unit in network.units().items():
            if isinstance(unit, WeightedUnit):
                found[f"{name}.weight"] = unit.weight
            else:
                found |= {f"{name}.{inner}": weight for inner, weight in layer_weights_of(unit).items()}
        return found
    return layer_weights_of(network)


def layer_weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters called weight, or *_weight, that have two or more dimensions."""
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if name.endswith("weight") and parameter.dim() > 1
    }


def measure_flatness(
    network: nn.Module,
    spec: InputSpec,
    batches: Sequence[Batch],
    *,
    probes: int = 32,
    iterations: int = 100,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Flatness:
    """Eigenvalues and traces for a network on batches that lie on its device.

    network: a QuantizedModel, or one in full precision, which reads spec.normalize(pixels). Its mode is restored, no
    statistic or gradient of it changes. Raises TrainingError where the loss is not finite, there is no weight, or an
    operator has no second derivative.
    """
    if probes < 2 or iterations < 1:
        raise TrainingError(f"probes is {probes} and iterations {iterations}; give at least 2 probes and 1 iteration.")
    weights = list(layer_weights(network).values())
    if not weights:
        raise TrainingError("the network has no weights of convolutions or linear layers to measure a Hessian in.")

    def logits(pixels: Tensor) -> Tensor:
        found: Tensor = network(pixels if isinstance(network, QuantizedModel) else spec.normalize(pixels))
        return found

    loss, scale = MeanLoss(logits, weights, batches), filter_norms(weights)
    with _differentiated_twice(network):
        value, gradient = loss.gradient()
        if not math.isfinite(value):
            raise TrainingError(f"the network's cross entropy is {value}; a Hessian needs a finite loss.")
        _require_second_derivatives(network, loss)
        product = loss.hessian_product
        raw, normalized = (
            _curvature(turned, scale, kind, probes=probes, iterations=iterations, seed=seed, progress=progress)
            for kind, turned in (
                ("raw", product),
                ("filter-normalised", lambda direction: scale * product(scale * direction)),
            )
        )
    return Flatness(
        weights=len(scale),
        loss=value,
        gradient_norm=float(gradient.double().norm()),
        raw=raw,
        normalized=normalized,
    )


def _curvature(
    product: Product, like: Tensor, kind: str, *, probes: int, iterations: int, seed: int, progress: Progress
) -> Curvature:
    """Of one Hessian; the first direction and the probes are the same for every Hessian of this size and seed."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(len(like), generator=generator).to(like)
    what = f"{kind} eigenvalue"
    eigenvalue, residual, done = top_eigenvalue(
        product, start, iterations=iterations, progress=_tell(progress, what, iterations)
    )
    progress(what, iterations, iterations)  # it may have ended early
    estimate, error = trace(
        product, like, probes=probes, generator=generator, progress=_tell(progress, f"{kind} trace", probes)
    )
    return Curvature(
        eigenvalue=eigenvalue,
        residual=residual,
        iterations=done,
        converged=residual <= TOLERANCE * abs(eigenvalue),
        trace=estimate,
        trace_error=error,
    )


@contextmanager
def _differentiated_twice(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, in functions that have second derivatives; on a GPU in full float32."""
    was_training = network.training
    with ExitStack() as stack:
        stack.callback(network.train, was_training)
        network.eval()
        stack.enter_context(twice_differentiable())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused attentions differentiate once
        if next(network.parameters()).is_cuda:  # TF32 would drown the residual of an eigenvector in rounding
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        yield


def _require_second_derivatives(network: nn.Module, loss: MeanLoss) -> None:
    """Raise TrainingError where an operator has none.

    A function that says of itself that it differentiates once is found only on the way to all leaves of the graph: the
    products ask for the weights alone, and would take its gradient for a constant.
    """
    kept = [(parameter, parameter.grad) for parameter in network.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        loss.gradient_energy().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "derivative for" not in str(error) and "once_differentiable" not in str(error):
            raise
        raise TrainingError(
            f"an operator of the network has no second derivative ({str(error).splitlines()[0]}), so that its Hessian "
            "cannot be measured."
        ) from error
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def _tell(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    return lambda done: progress(what, done, total)
