"""What a checkpoint has to have in common with the run that goes on from it, and what may differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mecdeploy.training.config import TrainConfig
from mecdeploy.training.data import ImageDataset
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.names import may_change
from mecdeploy.training.world import World


def require_same_run(
    config: TrainConfig, dataset: ImageDataset, spec: InputSpec, header: Mapping[str, Any], path: Path
) -> None:
    """Refuse, with a TrainingError, a checkpoint of another config or of other data.

    spec: the input of the network that is to go on. header, path: of the checkpoint.
    """
    saved = _flat(TrainConfig.from_description(header["config"]).describe())
    for key, value in _flat(config.describe()).items():
        if saved.get(key) != value and not may_change(key, saved.get(key), value):
            raise TrainingError(
                f"{key} is {value!r}, but {path} was trained with {saved.get(key)!r}. "
                f"Resume with the old value, or start another run from this one with weights."
            )
    saved_spec = InputSpec(**header["input"])
    if config.weights:  # they may bring their own normalisation
        saved_spec = replace(spec, channels=saved_spec.channels, height=saved_spec.height, width=saved_spec.width)
    data = {
        "class_names": (list(dataset.class_names), header["class_names"]),
        "train_images": (len(dataset.train), header["train_images"]),
        "input": (spec, saved_spec),
    }
    for key, (now, then) in data.items():
        if now != then:
            raise TrainingError(
                f"the data has changed: {key} is {now}, {path} was trained with {then}. Start a new run."
            )


def differences(header: Mapping[str, Any], device: torch.device, world: World, name: str) -> list[str]:
    """Sentences about what may make the result differ from that of an uninterrupted run. name: of the checkpoint."""
    then = {"processes": 1, **header}  # older checkpoints do not say
    now = {"torch": torch.__version__, "device": device.type, "processes": world.size}
    return [
        f"{name} was written with {key} {then[key]}, this is {key} {value}: "
        "the result may differ in the last bits from an uninterrupted run."
        for key, value in now.items()
        if then[key] != value
    ]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and prefix != "quant.":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
