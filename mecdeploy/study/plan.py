"""The cells of a study: every run with its name, its config and the run that it starts from. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from mecdeploy.config import Settings, merge, resolve
from mecdeploy.errors import UserError
from mecdeploy.study.config import START, Study, widths
from mecdeploy.training.config import TrainConfig
from mecdeploy.training.errors import TrainingError

FINAL = "checkpoint-final.safetensors"
RUNS = "runs"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run.

    name: of its folder. regime: empty where the study has none. method: as the study calls it; "start" for a run that
    others start from. bits: as W2A4, empty for full precision. settings: what it has on top of base, beside seed and
    bits. start: name of the run it starts from, empty for none.
    """

    name: str
    regime: str
    method: str
    bits: str
    seed: int
    config: TrainConfig
    settings: Settings
    start: str = ""

    @property
    def epochs(self) -> int:
        """Of all stages."""
        schedule = self.config.schedule
        return schedule.fp_epochs + (0 if self.config.method == "fp32" else schedule.epochs)


def plan(study: Study, out: Path) -> tuple[Cell, ...]:
    """Every run of the study in the order in which they begin: starts, then one whole comparison after the other.

    out: the study's folder, in which the weights of a start are going to lie.
    Raises UserError, naming the run, for settings that no run can have, for budgets that differ, and for test images
    that an earlier choice may have seen.
    """
    starts: list[Cell] = []
    cells: list[Cell] = []
    for seed in study.axes.seeds:
        for regime in study.regimes or ("",):
            start = _start(study, regime, seed, starts)
            weights = str(out / RUNS / start.name / FINAL) if start else study.start.weights if study.start else ""
            cells += _comparison(study, regime, seed, weights, start.name if start else "")
    planned = (*starts, *cells)
    for name, count in Counter(cell.name for cell in planned).items():
        if count > 1:
            raise UserError(f"{study.source}: {count} runs would be called {name}; rename a method or a regime.")
    if study.axes.equal_budget:
        _require_equal_budgets(study, cells)
    if study.axes.test:
        _require_carved_validation(study, planned)
    return planned


def _start(study: Study, regime: str, seed: int, starts: list[Cell]) -> Cell | None:
    """The run that trains what the others of this regime and seed start from; regimes that train the same share it."""
    start = study.start
    if start is None or start.settings is None:
        return None
    own = seed if start.per_seed else start.seed
    name = "-".join(part for part in (regime, START, f"seed{own}") if part)
    settings = reduce(merge, (study.regimes.get(regime, {}), start.settings, {"method": "fp32"}))
    config = _resolve(study, name, study.base, settings, {"seed": own})
    for known in starts:
        if known.config == config:
            return known
    cell = Cell(name=name, regime=regime, method=START, bits="", seed=own, config=config, settings=settings)
    starts.append(cell)
    return cell


def _comparison(study: Study, regime: str, seed: int, weights: str, start: str) -> Iterator[Cell]:
    """Every method at every width, of one regime and seed."""
    from_start: Settings = {"weights": weights, "schedule": {"fp_epochs": 0}} if weights else {}
    below = (study.base, from_start, study.regimes.get(regime, {}))
    for bits in study.axes.bits:
        for method, settings in study.methods.items():
            full_precision = reduce(merge, (*below, settings))["method"] == "fp32"
            if full_precision and bits != study.axes.bits[0]:
                continue  # it has no bits, so it runs once
            label = "" if full_precision else bits
            name = "-".join(part for part in (regime, method, label.lower(), f"seed{seed}") if part)
            axes: Settings = {"seed": seed}
            if label:
                axes["quant"] = dict(zip(("weight_bits", "act_bits"), widths(bits), strict=True))
            config = _resolve(study, name, *below, settings, axes)
            begun = start if config.weights == weights else ""
            yield Cell(
                name=name,
                regime=regime,
                method=method,
                bits=label,
                seed=seed,
                config=config,
                settings=merge(study.regimes.get(regime, {}), settings),
                start=begun,
            )


def _resolve(study: Study, name: str, *layers: Settings) -> TrainConfig:
    try:
        return resolve(reduce(merge, layers))
    except (TrainingError, UserError) as error:
        raise UserError(f"{study.source}: run {name}: {error}") from None


def _require_equal_budgets(study: Study, cells: Sequence[Cell]) -> None:
    for regime in dict.fromkeys(cell.regime for cell in cells):
        epochs = {cell.method: cell.epochs for cell in cells if cell.regime == regime}
        if len(set(epochs.values())) > 1:
            listed = ", ".join(f"{method} {count}" for method, count in epochs.items())
            where = f" in regime {regime}" if regime else ""
            raise UserError(
                f"{study.source}: methods train for different numbers of epochs{where}: {listed}. Set schedule.epochs "
                "(schedule.fp_epochs of fp32) so that they agree, or study.equal_budget = false."
            )


def _require_carved_validation(study: Study, cells: Sequence[Cell]) -> None:
    for cell in cells:
        if cell.config.data.validation != "carved":
            raise UserError(
                f"{study.source}: study.test is true, but run {cell.name} validates on images that are not carved from "
                "the training images, so that the test images would be seen by every choice; set data.validation = "
                '"carved" in [base], or study.test = false.'
            )
