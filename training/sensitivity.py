"""Mixed precision by measurement: what every layer loses at every width, the widths that follow, whether they hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mecdeploy.training.bit_allocation import allocate, monotone_costs, packed_size, parse_size
from mecdeploy.training.checkpoint import FINAL, read_checkpoint
from mecdeploy.training.config import BIT_WIDTHS, QuantConfig, TrainConfig
from mecdeploy.training.data import ImageSource
from mecdeploy.training.device import reproducible
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.initial import load_tensors
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.models import build_model
from mecdeploy.training.preparation import prepare
from mecdeploy.training.sensitivity_bench import (
    NARROWER,
    WIDEST,
    Bench,
    NetworkScore,
    Progress,
    Score,
    Sensitivity,
    all_at,
    hold_out,
    weighted_units,
)

PROPOSED, OWN = "proposed", "this run's widths"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What was measured and what follows from it.

    images: measured, none of them among the calibration_images. float_score: of the full-precision network.
    baseline: with weights and activations at 8 bits. budget: bytes. bits: the proposed width of every measured layer.
    predicted: sum of the proposed widths' costs, to compare with the proposed network's measured change.
    networks: the proposed one first, then this run's own widths, then every uniform width.
    """

    images: int
    calibration_images: int
    float_score: Score
    baseline: Score
    layers: tuple[Sensitivity, ...]
    activations: tuple[Sensitivity, ...]
    budget: int
    bits: Mapping[str, int]
    predicted: float
    networks: tuple[NetworkScore, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class LayerWidths:
    """Weighted units of a network, in execution order: how many weights, the run's own bits, and the fixed ones.

    fixed: bits of units that have the same under every setting (a BatchNorm that no layer takes in).
    """

    counts: Mapping[str, int]
    own: Mapping[str, int]
    fixed: Mapping[str, int]

    @property
    def free(self) -> list[str]:
        """The units whose bits a setting chooses."""
        return [name for name in self.counts if name not in self.fixed]

    def budget(self, size: str | None) -> int:
        """Bytes that a size means, None being the run's own. Raises TrainingError for one that nothing fits."""
        if size is None:
            return packed_size(self.counts, self.own)
        budget = parse_size(size, packed_size(self.counts, dict.fromkeys(self.counts, WIDEST)))
        self.cheapest({name: dict.fromkeys(BIT_WIDTHS, 0.0) for name in self.free}, budget)
        return budget

    def cheapest(self, costs: Mapping[str, Mapping[int, float]], budget: int) -> dict[str, int]:
        """`allocate` for the free units, the fixed ones taking their part of the budget."""
        fixed = {name: {bits: 0.0} for name, bits in self.fixed.items()}
        bits = allocate(self.counts, {**costs, **fixed}, budget)
        return {name: bits[name] for name in self.free}


def layer_widths(float_model: nn.Module, quant: QuantConfig, spec: InputSpec) -> LayerWidths:
    """What can be chosen for a network. Raises TrainingError where nothing can."""
    own = weighted_units(prepare(float_model, quant, spec))
    narrow = weighted_units(prepare(float_model, all_at(quant, NARROWER[0]), spec))
    widths = LayerWidths(
        counts={name: unit.weight.numel() for name, unit in own.items()},
        own={name: unit.weight_quantizer.bits for name, unit in own.items()},
        fixed={
            name: unit.weight_quantizer.bits
            for name, unit in narrow.items()
            if unit.weight_quantizer.bits != NARROWER[0]
        },
    )
    if not widths.free:
        raise TrainingError("the network has no quantised layer whose bits can be chosen; see quant.float_layers.")
    return widths


def study(
    float_model: nn.Module,
    spec: InputSpec,
    source: ImageSource,
    config: TrainConfig,
    *,
    size: str | None = None,
    images: int = 1024,
    activations: bool = False,
    device: torch.device,
    progress: Progress = lambda what, done, total: None,
) -> Study:
    """Measure every layer at every width, propose widths for a size, measure the proposal.

    source: the training images of the run that `config` describes; validation images would be spent by looking.
    size: of all packed weights, as for `parse_size`; None for the size of the run's own widths. images: how many to
    measure on, fewer where the source has no more. activations: measure them too (the size does not depend on them).
    Raises TrainingError for a size that no assignment fits, or too few images.
    """
    with reproducible(device):
        widths = layer_widths(float_model, config.quant, spec)
        budget = widths.budget(size)
        held_out = hold_out(source, config, images, device)
        bench = Bench(float_model, spec, config.quant, held_out, device)
        layers = bench.layers(widths.free, progress)
        costs = {
            layer.name: monotone_costs({WIDEST: 0.0, **{b: c.cross_entropy for b, c in layer.changes.items()}})
            for layer in layers
        }
        bits = widths.cheapest(costs, budget)
        named = {PROPOSED: {**widths.fixed, **bits}, OWN: widths.own}
        named |= {
            f"all at {width} bits": {**widths.fixed, **dict.fromkeys(widths.free, width)}
            for width in reversed(BIT_WIDTHS)
        }
        return Study(
            images=len(bench.baseline.losses),
            calibration_images=sum(len(batch) for batch in held_out.calibration),
            float_score=bench.float_outcome.score(),
            baseline=bench.baseline.score(),
            layers=layers,
            activations=bench.activations(progress) if activations else (),
            budget=budget,
            bits=bits,
            predicted=sum(costs[name][width] for name, width in bits.items()),
            networks=bench.networks(named, progress),
        )


def load_float_network(out: Path, config: TrainConfig) -> tuple[nn.Module, InputSpec, Path]:
    """The full-precision network of the finished run in `out`, its input, and the checkpoint that holds it.

    config: the run's own, as run.toml has it: a network from a file of the user's is executed on its word. Works for
    every method. Raises TrainingError when the run has not finished, or when its
    checkpoint is damaged or does not fit.
    """
    path = out / FINAL
    if not path.exists():
        raise TrainingError(f"{out} has not finished training; resume it with mecdeploy train --out {out} --resume.")
    checkpoint = read_checkpoint(path)
    spec = InputSpec(**checkpoint.header["input"])
    classes = len(checkpoint.header["class_names"])
    model = build_model(
        config.network, num_classes=classes, channels=spec.channels, height=spec.height, width=spec.width
    )
    try:
        load_tensors(model, checkpoint.section("float"))
    except RuntimeError as error:
        raise TrainingError(
            f"{path} does not fit this version's {config.model.name} ({str(error).splitlines()[0]}). "
            "Use the version that trained it."
        ) from error
    return model.eval(), spec, path
