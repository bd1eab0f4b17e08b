"""study.toml: what is compared with what. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mecdeploy.config import Settings, build, flatten, read_settings, resolve
from mecdeploy.errors import UserError
from mecdeploy.training.config import LAYER_WIDTHS
from mecdeploy.training.errors import TrainingError

START = "start"
MEASURES = {"representation": {"images": 2}, "hessian": {"images": 2, "probes": 2, "iterations": 1, "seed": 0}}
"""Measure -> what can be set of it, with the least value, as its command has it."""
_TABLES = ("study", "base", START, "methods", "regimes")
_AXES = {"seed": "study.seeds", "quant.weight_bits": "study.bits", "quant.act_bits": "study.bits"}
_NAME = re.compile(r"[\w.+-]+")
_BITS = re.compile(r"W(\d)A(\d)")


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The table [study].

    seeds, bits: every method runs with each of them; bits as W2A4: weights, activations.
    baseline: the method that every other one is paired with, seed by seed.
    jobs: runs at once; 0 for one on each of `devices`, or one. threads: of each run.
    devices: CUDA_VISIBLE_DEVICES of the runs, in turn; empty leaves it as it is.
    test: read the test images, once, when every run is done.
    measures: what else to measure of every run: a key of MEASURES -> its options.
    equal_budget: refuse methods that differ in how many epochs they train for.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    bits: tuple[str, ...] = ("W4A4",)
    baseline: str = ""
    jobs: int = 0
    threads: int = 1
    devices: tuple[str, ...] = ()
    test: bool = False
    measures: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    equal_budget: bool = True

    def __post_init__(self) -> None:
        for key in ("seeds", "bits"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise UserError(f"study.{key} is {list(values)}; list at least one, and none twice.")
        if min(self.seeds) < 0:
            raise UserError(f"study.seeds holds {min(self.seeds)}; a seed must be at least 0.")
        for bits in self.bits:
            widths(bits)
        for measure, options in self.measures.items():
            if measure not in MEASURES:
                raise UserError(f"study.measures holds {measure!r}; choose from {', '.join(MEASURES)}.")
            for key, value in options.items():
                if key not in MEASURES[measure]:
                    raise UserError(
                        f"study.measures.{measure} holds {key!r}; choose from {', '.join(MEASURES[measure])}."
                    )
                if value < MEASURES[measure][key]:
                    raise UserError(
                        f"study.measures.{measure}.{key} is {value}; it must be at least {MEASURES[measure][key]}."
                    )
        for key, minimum in (("jobs", 0), ("threads", 1)):
            if getattr(self, key) < minimum:
                raise UserError(f"study.{key} is {getattr(self, key)}; it must be at least {minimum}.")


@dataclass(frozen=True, kw_only=True)
class Start:
    """The table [start], beside its settings: where all other runs start from.

    weights: given, instead of a run that trains them. per_seed: one start for each of study.seeds. seed: of the one
    start, otherwise. settings: of the run that trains it, on top of base; None where its weights are given.
    """

    weights: str = ""
    per_seed: bool = False
    seed: int = 0
    settings: Settings | None = None


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole study.toml. base, methods, regimes: settings as in run.toml, with only the keys that somebody set."""

    source: str
    axes: Axes
    base: Settings
    methods: Mapping[str, Settings]
    regimes: Mapping[str, Settings] = field(default_factory=dict)
    start: Start | None = None


def widths(bits: str) -> tuple[int, int]:
    """Weight and activation bits of "W2A4". Raises UserError for anything else."""
    match = _BITS.fullmatch(bits)
    found = (int(match[1]), int(match[2])) if match else (0, 0)
    if not set(found) <= set(LAYER_WIDTHS):
        listed = ", ".join(map(str, LAYER_WIDTHS))
        raise UserError(f"study.bits holds {bits!r}; write weights and activations as W2A4, each one of {listed}.")
    return found


def read_study(path: Path) -> Study:
    """Read and validate all of the file that can be judged table by table; `plan` judges the runs.

    Raises UserError, naming the file, the table and the key.
    """
    content, source = read_settings(path), str(path)
    for table in content:
        if table not in _TABLES:
            match = get_close_matches(table, _TABLES, n=1)
            raise UserError(
                f"{source}: unknown table [{table}]"
                + (f"; did you mean [{match[0]}]?" if match else f"; it may have {', '.join(_TABLES)}.")
            )
    tables = {name: _table(source, name, content.get(name, {})) for name in _TABLES}
    try:
        axes: Axes = build(Axes, tables["study"], ("study",), "")
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    study = Study(
        source=source,
        axes=axes,
        base=_settings(source, "base", tables["base"]),
        methods={name: _named(source, "methods", name, value) for name, value in tables["methods"].items()},
        regimes={name: _named(source, "regimes", name, value) for name, value in tables["regimes"].items()},
        start=_start(source, tables[START]) if START in content else None,
    )
    _require_coherent(study)
    return study


def _require_coherent(study: Study) -> None:
    source, baseline = study.source, study.axes.baseline
    if not study.methods:
        raise UserError(f"{source}: there is no method to compare; add a table [methods.NAME].")
    if START in study.methods:
        raise UserError(f"{source}: methods.{START} has the name of the runs that others start from; choose another.")
    if baseline and baseline not in study.methods:
        match = get_close_matches(baseline, study.methods, n=1)
        hint = f"did you mean {match[0]!r}?" if match else f"choose one of {', '.join(study.methods)}."
        raise UserError(f"{source}: study.baseline is {baseline!r}, which is none of the methods; {hint}")
    for name, settings in study.methods.items():
        if "method" not in settings and "method" not in study.base:
            raise UserError(f'{source}: methods.{name} has no method; add method = "lsq" (or mec, fp32, ...).')
    if study.start is not None and "weights" in study.base:
        raise UserError(f"{source}: both base.weights and [start] say where runs start from; drop one of them.")


def _table(source: str, name: str, value: Any) -> Settings:
    if not isinstance(value, Mapping):
        raise UserError(f"{source}: {name} is {value!r}; it is a table: write [{name}] and its keys below it.")
    return dict(value)


def _named(source: str, kind: str, name: str, value: Any) -> Settings:
    if not _NAME.fullmatch(name):
        raise UserError(f"{source}: {kind}.{name!r} is part of a folder's name; use letters, digits, '_', '-', '.'.")
    return _settings(source, f"{kind}.{name}", _table(source, f"{kind}.{name}", value))


def _settings(source: str, table: str, settings: Settings) -> Settings:
    """The table's settings, refused where a key is unknown, has a value of another type, or is an axis of the study."""
    with suppress(TrainingError):  # the other tables may bring a value into its range; `plan` sees them together
        resolve(settings, source=f"{source}: {table}")
    for key, _ in flatten(settings):
        if key in _AXES:
            raise UserError(f"{source}: {table} sets {key}, which {_AXES[key]} sets for every run; drop it.")
    return settings


def _start(source: str, table: Settings) -> Start:
    own: Settings = {key: table[key] for key in ("per_seed", "seed") if key in table}
    try:
        start: Start = build(Start, own, (START,), "")
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    settings = _settings(source, START, {key: value for key, value in table.items() if key not in own})
    if start.per_seed and "seed" in own:
        raise UserError(f"{source}: start.per_seed gives each start a seed of study.seeds; drop start.seed.")
    if settings.get("method", "fp32") != "fp32":
        raise UserError(f"{source}: start.method is {settings['method']!r}; a start is full precision, drop the key.")
    if set(settings) == {"weights"}:
        if own:
            raise UserError(f"{source}: start.weights is given, so nothing is trained with {', '.join(own)}; drop it.")
        return Start(weights=settings["weights"])
    return Start(per_seed=start.per_seed, seed=start.seed, settings=settings)
