"""TOML to TrainConfig and back, generically from the dataclasses: a new field of a stage needs no line here.

Imports no torch, so that a wrong config is refused in a fraction of a second.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from mecdeploy.errors import UserError
from mecdeploy.training.config import RENAMED, TrainConfig
from mecdeploy.training.names import may_change, user_file

Settings = dict[str, Any]
"""A config as nested plain values, with only the keys somebody set."""


def read_settings(path: Path) -> Settings:
    """The keys a TOML file sets, unvalidated. Raises UserError naming the file and, for bad TOML, the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such config file.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Settings:
    """Both settings together; where both set a key, `over` wins."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both_sections = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = merge(below, value) if both_sections else value  # type: ignore[arg-type]
    return merged


def resolve(settings: Mapping[str, Any], *, source: str = "") -> TrainConfig:
    """Settings as a validated TrainConfig; what nobody set has its default.

    A short run gets a short final phase, unless the settings name one: at most half of its epochs, rounded up. A run
    without labels gets no full-precision epochs, unless they ask for some (which is refused).
    source: the file to blame in messages, if any.
    Raises UserError for an unknown key (did you mean) or a value of the wrong type, TrainingError for one out of range.
    """
    schedule = settings.get("schedule", {})
    if isinstance(schedule, Mapping) and "frozen_epochs" not in schedule and type(schedule.get("epochs")) is int:
        default = TrainConfig().schedule.frozen_epochs
        settings = merge(settings, {"schedule": {"frozen_epochs": max(0, min(default, (schedule["epochs"] + 1) // 2))}})
    if isinstance(data := settings.get("data"), Mapping) and data.get("labels") == "none":
        settings = merge({"schedule": {"fp_epochs": 0}}, settings)
    config: TrainConfig = build(TrainConfig, settings, (), f"{source}: " if source else "")
    return config


def read_config(path: str | Path) -> TrainConfig:
    """A whole config from a TOML file. Raises UserError or TrainingError as `read_settings` and `resolve` do."""
    return resolve(read_settings(Path(path)), source=str(path))


def to_toml(config: TrainConfig) -> str:
    """Every key with its value; `resolve(tomllib.loads(...))` gives the same config back."""
    import tomli_w

    return tomli_w.dumps(config.describe())


def require_same_run(config: TrainConfig, started: TrainConfig, run: str) -> None:
    """Refuse to go on with a run under settings that it was not started with; where it runs and reads may change."""
    for key, value, then in changes(config, started):
        if not may_change(key, then, value):
            raise UserError(f"{key} is {value}, but {run} was started with {then}. Drop it, or start another run.")


def changes(config: TrainConfig, other: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Each dotted key in which `config` differs from `other`, with its value in both."""
    values = dict(flatten(other.describe()))
    return [(key, value, values.get(key)) for key, value in flatten(config.describe()) if value != values.get(key)]


def run_name(config: TrainConfig) -> str:
    """A folder name for a run, such as digits-resnet8-mec-w4a4-seed0. The network of net.py:make is net-make."""
    kind, _, path = config.data.name.partition(":")
    data = f"{kind}-{Path(path).name}" if path else kind
    bits = "" if config.method == "fp32" else f"-w{config.quant.weight_bits}a{config.quant.act_bits}"
    named = user_file(config.model.name)
    model = config.model.name if named is None else f"{named[0].stem}-{named[1]}"
    return re.sub(r"[^\w.+-]", "_", f"{data}-{model}-{config.method}{bits}-seed{config.seed}")


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of nested settings under its dotted key."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def build(section: type[Any], settings: Mapping[str, Any], path: tuple[str, ...], blame: str) -> Any:
    """A frozen dataclass from a table of plain values, checked against its fields' types.

    path: names of the tables that lead to this one. blame: what every message begins with.
    """
    types = get_type_hints(section)
    values = {}
    for key, value in settings.items():
        if key not in types:
            raise UserError(f"{blame}unknown key {_dotted((*path, key))!r}{_did_you_mean(key, path, section)}")
        values[key] = _convert(types[key], value, (*path, key), blame)
    return section(**values)


def _convert(expected: Any, value: Any, path: tuple[str, ...], blame: str) -> Any:
    """The value as its field's type: integers stand for floats, lists for tuples; nothing else is coerced."""
    key = _dotted(path)
    if is_dataclass(expected) and isinstance(expected, type):
        if not isinstance(value, Mapping):
            raise UserError(f"{blame}{key} is {value!r}; it is a section: write [{key}] and its keys below it.")
        return build(expected, value, path, blame)
    origin, arguments = get_origin(expected), get_args(expected)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{blame}{key} is {value!r}; it must be a list.")
        return tuple(_convert(arguments[0], item, path, blame) for item in value)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{blame}{key} is {value!r}; it must be a table.")
        return {name: _convert(arguments[1], item, (*path, name), blame) for name, item in value.items()}
    accepted = arguments if origin in (Union, UnionType) else (expected,)
    if type(value) in accepted:
        return value
    if float in accepted and type(value) is int:
        return float(value)
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    wanted = " or ".join(names[kind] for kind in accepted if kind in names)
    raise UserError(f"{blame}{key} is {value!r}; it must be {wanted}.")


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(path)


def _did_you_mean(key: str, path: tuple[str, ...], section: type[Any]) -> str:
    """The likeliest key: spelt alike in the same section or below it, or spelt so in another one of a run."""
    if not path and key in RENAMED:
        return f"; did you mean {RENAMED[key]!r}?"
    here = {_dotted(below): _dotted((*path, *below)) for below in _keys(section)}
    elsewhere = {below[-1]: _dotted(below) for below in _keys(TrainConfig)}
    for candidates in (here, elsewhere):
        for match in get_close_matches(key, candidates, n=1, cutoff=0.7):
            return f"; did you mean {candidates[match]!r}?"
    return "; docs/cli.md lists the keys."


def _keys(section: type[Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key of a section, and of every key of the sections below it."""
    types = get_type_hints(section)
    for field in fields(section):
        yield (*path, field.name)
        if is_dataclass(below := types[field.name]) and isinstance(below, type):
            yield from _keys(below, (*path, field.name))
