"""The maximum-entropy-coding term of the loss: which tensors are coded, by which rows, with which weight.

docs/mec-quant.md explains the method. In the mixture form nothing here waits for the device. Which rows are coded
depends on the generator alone.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from mecdeploy.training.coding import (
    coded_dimensions,
    coding_rate_exact,
    coding_rate_moe,
    normalize_rows,
    scale_rows,
)
from mecdeploy.training.config import MecConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.recording import Recording


@dataclass(frozen=True, kw_only=True)
class MecTerms:
    """What one step takes off the loss: loss = task loss - total.

    total: [], beta (after warm-up) times the mean over the kinds of coded tensors; attached to the autograd graph.
    terms: kind of tensor (features, activations, weights) -> [] mean rate in nats per coded dimension; "beta" -> [] the
    weight in force. Detached, so that logging them keeps no graph alive.
    """

    total: Tensor
    terms: dict[str, Tensor]


def mec_objective(
    recording: Recording,
    config: MecConfig,
    *,
    other: Recording | None = None,
    step_fraction: float,
    generator: torch.Generator | None = None,
) -> MecTerms:
    """The objective to maximise, from what one forward pass recorded.

    other: the second view's recording, when config.views is augmented or teacher: features are then coded against its
    features, row by row (a teacher's are detached); activations and weights are always coded by themselves.
    step_fraction: QAT steps done / all QAT steps, 0..1; beta rises linearly from 0 while it is under config.warmup,
    and falls linearly to 0 in the last config.decay of it.
    generator: picks the rows where a tensor has more than config.samples. Any device; none: the global one.

    Raises TrainingError when a tensor that config.code asks for was not recorded, or the views do not fit together.
    """
    means = {kind: _mean_rate(kind, recording, config, other, generator) for kind in config.code}
    risen = min(1.0, step_fraction / config.warmup) if config.warmup > 0 else 1.0
    left = min(1.0, (1.0 - step_fraction) / config.decay) if config.decay > 0 else 1.0
    beta = config.beta * risen * left
    device = next(iter(means.values())).device if means else None
    rates = [mean.to(device) for mean in means.values()]
    total = beta * torch.stack(rates).mean() if rates else torch.zeros(())
    terms = {kind: mean.detach() for kind, mean in means.items()}
    return MecTerms(total=total, terms={**terms, "beta": torch.tensor(beta)})


def _mean_rate(
    kind: str, recording: Recording, config: MecConfig, other: Recording | None, generator: torch.Generator | None
) -> Tensor:
    features = [] if recording.features is None else [recording.features]
    tensors: dict[str, Collection[Tensor]] = {
        "features": features,
        "activations": recording.activations.values(),
        "weights": recording.weights.values(),
    }
    if not tensors[kind]:
        raise TrainingError(f"mec.code asks for {kind}, but the forward pass recorded none; take it out of mec.code.")
    if kind == "features" and (other is not None or config.views != "one"):
        return _two_view_rate(features[0], other, config, generator)
    # Weights are few and are all coded: a filter left out would get no gradient.
    limit = sys.maxsize if kind == "weights" else config.samples
    rates = [_one_view_rate(choose_rows(tensor, limit, generator), config) for tensor in tensors[kind]]
    return torch.stack([rate.to(rates[0].device) for rate in rates]).mean()


def _one_view_rate(rows: Tensor, config: MecConfig) -> Tensor:
    return _rate(scale_rows(rows, center=config.center), None, routing_energy(rows), config)


def _two_view_rate(
    features: Tensor, other: Recording | None, config: MecConfig, generator: torch.Generator | None
) -> Tensor:
    if other is None:
        raise TrainingError(f"mec.views is {config.views!r}, but there is no second view; set mec.views to 'one'.")
    if other.features is None or other.features.shape != features.shape:
        shape = None if other.features is None else list(other.features.shape)
        raise TrainingError(
            f"mec.views is {config.views!r}: the second view's features have shape {shape}, the first's "
            f"{list(features.shape)}; both views need the same images and the same network."
        )
    second = other.features.detach() if config.views == "teacher" else other.features
    index = sample_index(features.shape[0], config.samples, generator)
    first, second = features[index.to(features.device)], second[index.to(second.device)].to(features.device)
    # Normalised rows have lost their energies: route by those they had.
    energy = routing_energy(first) * routing_energy(second)
    first, second = normalize_rows(first, center=config.center), normalize_rows(second, center=config.center)
    return _rate(first, second, energy, config)


def _rate(rows: Tensor, other: Tensor | None, energy: Tensor, config: MecConfig) -> Tensor:
    """The rate of rows [m, d] (scaled), or of two views of them, in nats per coded dimension: []."""
    if config.form == "exact":
        return coding_rate_exact(rows, distortion=config.distortion, other=other) / coded_dimensions(*rows.shape)
    rate = coding_rate_moe(
        rows,
        distortion=config.distortion,
        experts=config.experts,
        order=config.order,
        center=config.center,
        energy=energy,
        other=other,
    )
    return rate / coded_dimensions(*rows.shape, experts=config.experts, center=config.center)


def routing_energy(rows: Tensor) -> Tensor:
    """What decides a row's expert: its energy [m] before any mean is taken off, relative to the mean row's.

    About the common mean the faint rows of a long-tailed tensor would all lie at minus that mean, and pass for strong.
    """
    return scale_rows(rows.detach(), center=False).square().sum(dim=-1)


def choose_rows(output: Tensor, limit: int, generator: torch.Generator | None) -> Tensor:
    """At most limit rows of a unit's output: one per image and position, its channels the columns.

    output: [m, C, *positions]. Returns [min(limit, m * positions), C]. Gathers from a view: no copy of the output.
    """
    rows = output.movedim(1, -1)
    *counts, channels = rows.shape
    total = torch.Size(counts).numel()
    if total <= limit:
        return rows.reshape(total, channels)
    index = sample_index(total, limit, generator).to(output.device)
    return rows[torch.unravel_index(index, counts)]


def sample_index(total: int, limit: int, generator: torch.Generator | None) -> Tensor:
    """min(total, limit) different row numbers in rising order, one from each of as many equal runs of rows.

    So every image gives its share, where drawing freely would not; costs O(limit), where a permutation costs O(total).
    """
    count = min(total, limit)
    device = "cpu" if generator is None else generator.device
    edges = torch.arange(count + 1, device=device) * total // count
    draws = torch.rand(count, dtype=torch.float64, device=device, generator=generator)
    return edges[:-1] + (draws * edges.diff()).long()
