"""What can be measured of a finished run beside its accuracy: its representation, and how flat its minimum is.

docs/measures.md defines every number. Each function writes a JSON file into the run folder; nothing here prints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mecdeploy import run_folder
from mecdeploy.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from mecdeploy.training.config import TrainConfig
    from mecdeploy.training.data import ImageDataset
    from mecdeploy.training.flatness import Flatness
    from mecdeploy.training.input_spec import InputSpec
    from mecdeploy.training.representation import CodeUse, FeatureSpread

REPRESENTATION, HESSIAN = "representation.json", "hessian.json"
MOST_REPRESENTED, MOST_DIFFERENTIATED = 1024, 512
PARTS = ("validation", "training")

Progress = Callable[[str, int, int], None]


def _silent(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class RepresentationReport:
    """The representation of a run's network, and for comparison that of the full-precision network it came from.

    part: of the data set, whose images were measured. activations, weights: one entry a quantiser, in execution order;
    empty for a run in full precision. float_features: None for such a run, whose features are these.
    """

    run: Path
    method: str
    part: str
    images: int
    activations: tuple[CodeUse, ...]
    weights: tuple[CodeUse, ...]
    features: FeatureSpread
    float_features: FeatureSpread | None

    def summary(self) -> dict[str, float]:
        """Scalars by name, for comparing runs. Means are over quantisers, each with the same weight."""
        found: dict[str, float] = {}
        for kind, uses in (("activation", self.activations), ("weight", self.weights)):
            if uses:
                found |= {f"{kind}_{name}": value for name, value in means(uses).items()}
        for kind, spread in (("feature", self.features), ("float_feature", self.float_features)):
            if spread is not None:
                values = dataclasses.asdict(spread)
                names = ("effective_rank", "participation_ratio", "within", "between", "spread_ratio", "coding_rate")
                found |= {f"{kind}_{name}": values[name] for name in names if values[name] is not None}
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**dataclasses.asdict(self), "run": str(self.run), "summary": self.summary()}


def means(uses: tuple[CodeUse, ...]) -> dict[str, float]:
    """Over quantisers, each with the same weight: entropy in bits and as a share of the most it could be, and so on."""
    import math

    columns = {
        "entropy": [use.entropy for use in uses],
        "entropy_share": [use.entropy / math.log2(use.available) for use in uses],
        "levels": [float(use.levels) for use in uses],
        "effective_levels": [use.effective_levels for use in uses],
        "lowest": [use.lowest for use in uses],
        "highest": [use.highest for use in uses],
    }
    return {name: sum(values) / len(values) for name, values in columns.items()}


def representation(
    run: str | Path,
    *,
    images: int | None = None,
    part: str = "validation",
    device: str = "auto",
    progress: Progress = _silent,
) -> RepresentationReport:
    """Measure how a finished run uses its codes and spreads its features; writes RUN/representation.json.

    run: the folder of a finished run of any method. images: how many to measure on; None for 1,024, or all where there
    are fewer. part: validation or training. progress: called with (what, done, total).
    Raises UserError for a folder that is no run or an unknown part, TrainingError for a run that has not finished, or
    more images than there are, OSError for a folder that cannot be written.
    """
    if part not in PARTS:
        raise UserError(f"part is {part!r}; choose one of {', '.join(PARTS)}.")
    folder = run_folder.require_run(Path(run))
    config = folder.read_config()
    from mecdeploy.training.device import choose_device, place, reproducible
    from mecdeploy.training.evaluate import BATCH_SIZE
    from mecdeploy.training.measured_images import batch_count, count_images, take
    from mecdeploy.training.representation import measure

    target = choose_device(dataclasses.replace(config, device=device).device)
    networks = _Networks.of(folder, config)
    dataset = _dataset(config, networks)
    source = dataset.validation if part == "validation" else dataset.train
    images = count_images(source, images, default=MOST_REPRESENTED, part=part)

    def measured(network: nn.Module, what: str) -> Any:
        batches = take(source, images, batch_size=BATCH_SIZE, device=target)
        total = batch_count(images, BATCH_SIZE)
        told = _told(batches, lambda done: progress(what, done, total))
        return measure(place(network, target), networks.spec, told, distortion=config.mec.distortion)

    with reproducible(target):
        plain = measured(networks.full_precision, "full precision")
        found = plain if networks.quantized is None else measured(networks.quantized, "quantised")
    report = RepresentationReport(
        run=folder.path,
        method=config.method,
        part=part,
        images=images,
        activations=found.activations,
        weights=found.weights,
        features=found.features,
        float_features=None if networks.quantized is None else plain.features,
    )
    _write(folder.path / REPRESENTATION, networks, report.to_json())
    return report


@dataclass(frozen=True, kw_only=True)
class HessianReport:
    """How sharp the minimum of a run is, over training images drawn by `seed`. probes: of the traces."""

    run: Path
    method: str
    images: int
    seed: int
    probes: int
    flatness: Flatness

    def summary(self) -> dict[str, float]:
        """Scalars by name, for comparing runs."""
        found: dict[str, float] = {}
        for name, curvature in (("hessian", self.flatness.raw), ("hessian_normalized", self.flatness.normalized)):
            found |= {f"{name}_eigenvalue": curvature.eigenvalue, f"{name}_trace": curvature.trace}
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**dataclasses.asdict(self), "run": str(self.run), "summary": self.summary()}


def hessian(
    run: str | Path,
    *,
    images: int | None = None,
    probes: int = 32,
    iterations: int = 100,
    seed: int = 0,
    device: str = "auto",
    progress: Progress = _silent,
) -> HessianReport:
    """Measure the Hessian of a finished run's cross entropy in its layers' weights; writes RUN/hessian.json.

    run: the folder of a finished run of any method. images: training images, without augmentation; None for 512, or all
    where there are fewer. probes: random signs for the traces. iterations: at most so many for an eigenvalue. seed:
    draws images, probes and the first direction, alike for every run on the same data. progress: called with (what,
    done, total).
    Raises UserError for a folder that is no run, TrainingError for a run that has not finished, more images than there
    are, or an operator without a second derivative, OSError for a folder that cannot be written.
    """
    folder = run_folder.require_run(Path(run))
    config = folder.read_config()
    from mecdeploy.training.device import choose_device, place, reproducible
    from mecdeploy.training.flatness import BATCH_SIZE, measure_flatness
    from mecdeploy.training.measured_images import count_images, take

    target = choose_device(dataclasses.replace(config, device=device).device)
    networks = _Networks.of(folder, config)
    source = _dataset(config, networks).train
    images = count_images(source, images, default=MOST_DIFFERENTIATED, part="training")
    network = networks.full_precision if networks.quantized is None else networks.quantized
    with reproducible(target):
        flatness = measure_flatness(
            place(network, target),
            networks.spec,
            list(take(source, images, batch_size=BATCH_SIZE, device=target, seed=seed)),
            probes=probes,
            iterations=iterations,
            seed=seed,
            progress=progress,
        )
    report = HessianReport(
        run=folder.path, method=config.method, images=images, seed=seed, probes=probes, flatness=flatness
    )
    _write(folder.path / HESSIAN, networks, report.to_json())
    return report


@dataclass(frozen=True, kw_only=True)
class _Networks:
    """What a finished run holds.

    quantized: None for a run in full precision. class_names: of a quantised one. sha256: of the checkpoint's bytes.
    """

    quantized: nn.Module | None
    full_precision: nn.Module
    class_names: tuple[str, ...]
    spec: InputSpec
    sha256: str

    @classmethod
    def of(cls, folder: run_folder.RunFolder, config: TrainConfig) -> _Networks:
        from mecdeploy.training.checkpoint import file_sha256
        from mecdeploy.training.run import load_run
        from mecdeploy.training.sensitivity import load_float_network

        if config.method == "fp32":
            network, spec, path = load_float_network(folder.path, config)
            return cls(quantized=None, full_precision=network, class_names=(), spec=spec, sha256=file_sha256(path))
        run = load_run(folder.path, model_name=config.model.name)
        return cls(
            quantized=run.model,
            full_precision=run.float_model,
            class_names=run.class_names,
            spec=run.spec,
            sha256=run.sha256,
        )


def _dataset(config: TrainConfig, networks: _Networks) -> ImageDataset:
    """The images of a run; without labels, which only quantised runs lack, its classes are those of the checkpoint."""
    from mecdeploy.training.data import load_dataset
    from mecdeploy.training.data.unlabelled import KnownClasses

    classes = KnownClasses(names=networks.class_names, named=True)
    return load_dataset(config.data, seed=config.seed, classes=lambda shape: classes)


def _told(batches: Any, tell: Callable[[int], None]) -> Any:
    """The batches, telling how many are done."""
    tell(0)
    for done, batch in enumerate(batches, 1):
        yield batch
        tell(done)


def _write(path: Path, networks: _Networks, record: Mapping[str, Any]) -> None:
    run_folder.write_json(path, {"checkpoint_sha256": networks.sha256, **record})
