"""What quantisation leaves of a network's representation: how its codes are used, how its features are spread.

docs/measures.md explains every number. Nothing here changes the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mecdeploy.training.coding import coded_dimensions, coding_rate_exact, scale_rows
from mecdeploy.training.data import Batch
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.quantizers import ActivationQuantizer, QTensor
from mecdeploy.training.units import Unit, WeightedUnit
from mecdeploy.training.weight_quantizers import WeightQuantizer

STORED = 256
"""Codes are stored in bytes."""


@dataclass(frozen=True, kw_only=True)
class CodeUse:
    """How often each code of one quantiser occurs, over all its values.

    name: of the value, or of the unit whose weights these are. bits: its width. available: codes it may use.
    entropy: of the histogram, in bits. levels: codes that occur. effective_levels: 2^entropy.
    lowest, highest: share of values at either end of the range, 0..1.
    """

    name: str
    bits: int
    available: int
    entropy: float
    levels: int
    effective_levels: float
    lowest: float
    highest: float


@dataclass(frozen=True, kw_only=True)
class FeatureSpread:
    """The features before the last layer: images x dimension, about their mean.

    effective_rank, participation_ratio: dimensions in use, 1..dimension; 0 where all images have the same features.
    within, between: share of the variance inside classes and among class means, together 1 (0 and 0 without variance).
    spread_ratio: within / between; None where class means do not differ.
    coding_rate: nats per dimension, at `distortion` (eps^2, for rows of unit RMS).
    """

    images: int
    dimension: int
    effective_rank: float
    participation_ratio: float
    within: float
    between: float
    spread_ratio: float | None
    coding_rate: float
    distortion: float


@dataclass(frozen=True, kw_only=True)
class Representation:
    """Everything measured. activations, weights: one entry a quantiser, in execution order; empty in full precision."""

    activations: tuple[CodeUse, ...]
    weights: tuple[CodeUse, ...]
    features: FeatureSpread


def code_use(name: str, bits: int, counts: Tensor) -> CodeUse:
    """From the histogram of one quantiser: how many values have each available code, lowest first, integers [codes].

    Entropy is the plug-in estimate -sum p log2 p (Shannon 1948).
    """
    shares = counts.double() / counts.sum()
    entropy = float(torch.special.entr(shares).sum()) / math.log(2)
    return CodeUse(
        name=name,
        bits=bits,
        available=len(counts),
        entropy=entropy,
        levels=int((counts > 0).sum()),
        effective_levels=2.0**entropy,
        lowest=float(shares[0]),
        highest=float(shares[-1]),
    )


@dataclass(frozen=True, kw_only=True)
class CodeHistogram:
    """How many values of one quantiser have each of its codes. codes: ascending integers; counts: integers [codes]."""

    name: str
    bits: int
    codes: tuple[int, ...]
    counts: Tensor

    def use(self) -> CodeUse:
        """The measures of it."""
        return code_use(self.name, self.bits, self.counts)


def effective_rank(rows: Tensor) -> float:
    """Exponential of the entropy of the singular values' shares, of rows [m, d]; 0 for rows of zeros.

    Source: Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    values = torch.linalg.svdvals(rows.double())
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def participation_ratio(rows: Tensor) -> float:
    """(sum l)^2 / sum l^2 over the eigenvalues l of Z^T Z, for rows Z [m, d]; 0 for rows of zeros.

    Source: Gao et al. 2017, "A theory of multineuronal dimensionality, dynamics and measurement".
    """
    energies = torch.linalg.svdvals(rows.double()).square()
    total = energies.sum()
    return float(total.square() / energies.square().sum()) if total > 0 else 0.0


def class_scatter(rows: Tensor, labels: Tensor) -> tuple[float, float]:
    """Traces of the scatter within classes and between their means, each over the trace of the total scatter.

    rows: [m, d]; labels: integers [m]. The traces add up to the total (Fisher's decomposition), so the shares add up to
    1 and no scale is left in them. (0, 0) where the rows are all the same.
    """
    rows = rows.double()
    centred = rows - rows.mean(0)
    total = float(centred.square().sum())
    if not total:
        return 0.0, 0.0
    between = 0.0
    for label in set(labels.tolist()):
        chosen = centred[labels == label]
        between += len(chosen) * float(chosen.mean(0).square().sum())
    return 1.0 - between / total, between / total


def feature_spread(features: Tensor, labels: Tensor, *, distortion: float) -> FeatureSpread:
    """All measures of features [m, d] with class labels [m]."""
    features = features.double()
    centred = features - features.mean(0)
    within, between = class_scatter(features, labels)
    rate = coding_rate_exact(scale_rows(features, center=True), distortion=distortion)
    return FeatureSpread(
        images=len(features),
        dimension=features.shape[1],
        effective_rank=effective_rank(centred),
        participation_ratio=participation_ratio(centred),
        within=within,
        between=between,
        spread_ratio=within / between if between else None,
        coding_rate=float(rate) / coded_dimensions(*features.shape),
        distortion=distortion,
    )


@torch.no_grad()
def measure(network: nn.Module, spec: InputSpec, batches: Iterable[Batch], *, distortion: float) -> Representation:
    """Run images through a network in evaluation mode (its own is restored), and look at its codes and features.

    network: a QuantizedModel, measured in the deployed arithmetic; or one in full precision, which reads
    spec.normalize(pixels). Raises TrainingError for a network without a convolution or linear layer.
    """
    was_training = network.training
    histograms: dict[str, _Histogram] = {}
    features, labels = [], []
    with ExitStack() as stack:
        stack.callback(network.train, was_training)
        network.eval()
        if isinstance(network, QuantizedModel):
            _count_codes(network, histograms, stack)
            read = _quantized_features(network)
        else:
            read = _float_features(network, spec, stack)
        for batch in batches:
            features.append(_pooled(read(batch.images[0])).double().cpu())
            labels.append(batch.labels.cpu())
    return Representation(
        activations=tuple(histogram.use(name) for name, histogram in histograms.items()),
        weights=tuple(found.use() for found in weight_histograms(network))
        if isinstance(network, QuantizedModel)
        else (),
        features=feature_spread(torch.cat(features), torch.cat(labels), distortion=distortion),
    )


class _Histogram:
    """How many values have each of the stored codes qmin..qmax, over all batches."""

    def __init__(self, bits: int) -> None:
        self._bits, self._counts, self._range = bits, torch.zeros(STORED, dtype=torch.int64), slice(0)

    def add(self, value: QTensor) -> None:
        self._counts += torch.bincount(value.stored().flatten(), minlength=STORED).cpu()
        self._range = slice(value.qmin, value.qmax + 1)

    def use(self, name: str) -> CodeUse:
        return code_use(name, self._bits, self._counts[self._range])


def _count_codes(network: QuantizedModel, histograms: dict[str, _Histogram], stack: ExitStack) -> None:
    """Until the stack closes, every unit that quantises adds its outputs to its histograms."""

    def count(unit: nn.Module, _: Any, result: Any) -> None:
        assert isinstance(unit, Unit)
        results = result if isinstance(result, tuple) else (result,)
        for name, value in zip(unit.output_names, results, strict=True):
            histograms[name].add(value)

    for unit in network.units().values():
        for name, output in zip(unit.output_names, unit.outputs, strict=False):  # units without have names all the same
            assert isinstance(output, ActivationQuantizer)
            histograms[name] = _Histogram(output.bits)
        if len(unit.outputs):
            stack.callback(unit.register_forward_hook(count).remove)


def weight_histograms(network: QuantizedModel) -> Iterator[CodeHistogram]:
    """Of every unit with weights, in execution order."""
    for name, unit in network.units().items():
        if isinstance(unit, WeightedUnit):
            quantizer = unit.weight_quantizer
            codes = quantizer(unit.weight)[0].flatten()
            levels = quantizer.levels
            if isinstance(quantizer, WeightQuantizer) and levels is None:
                levels = torch.arange(quantizer.lower, quantizer.upper + 1)
            assert levels is not None
            levels = torch.unique(levels)  # of a codebook, single entries
            places = torch.searchsorted(levels.to(codes), codes)
            counts = torch.bincount(places, minlength=len(levels))
            yield CodeHistogram(name=name, bits=quantizer.bits, codes=tuple(levels.tolist()), counts=counts.cpu())


def _quantized_features(network: QuantizedModel) -> Callable[[Tensor], Tensor]:
    def read(pixels: Tensor) -> Tensor:
        found: Tensor | None = network(pixels, code=("features",))[1].features
        assert found is not None
        return found

    return read


def _float_features(network: nn.Module, spec: InputSpec, stack: ExitStack) -> Callable[[Tensor], Tensor]:
    """What the last convolution or linear layer to be executed reads, as QuantizedModel.last_layer has it."""
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    if not layers:
        raise TrainingError("the network has no convolution or linear layer, and so no features to measure.")
    last: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        last[:] = inputs[:1]

    for layer in layers:
        stack.callback(layer.register_forward_pre_hook(keep).remove)

    def read(pixels: Tensor) -> Tensor:
        network(spec.normalize(pixels))
        return last.pop()

    return read


def _pooled(features: Tensor) -> Tensor:
    """Means over positions of a convolution's [m, C, H, W], or over tokens of a linear layer's [m, ..., d]: [m, d]."""
    if features.dim() == 4:
        return features.mean((2, 3))
    return features.flatten(1, -2).mean(1) if features.dim() > 2 else features
