"""From the name of a data set to the data set."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from mecdeploy.training.config import DataConfig
from mecdeploy.training.data.builtin import load_cifar10, load_cifar100, load_digits, load_fashion_mnist
from mecdeploy.training.data.folder import TRAIN
from mecdeploy.training.data.image_folder import Shape, load_image_folder
from mecdeploy.training.data.shards import load_shards
from mecdeploy.training.data.source import ImageDataset
from mecdeploy.training.data.unlabelled import KnownClasses
from mecdeploy.training.errors import TrainingError

FOLDER_PREFIX = "imagefolder:"
SHARDS_PREFIX = "shards:"
_IN_A_FOLDER = (FOLDER_PREFIX, SHARDS_PREFIX)
_NAMED: dict[str, Callable[[DataConfig], ImageDataset]] = {
    "digits": load_digits,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "fashion-mnist": load_fashion_mnist,
}


def available_datasets() -> tuple[str, ...]:
    """Every name that `load_dataset` knows, and the form of those that take a path."""
    return (*_NAMED, *(f"{prefix}PATH" for prefix in _IN_A_FOLDER))


def load_dataset(
    config: DataConfig, *, seed: int, classes: Callable[[Shape], KnownClasses] | None = None
) -> ImageDataset:
    """Load, and where need be download, split or decode, the data set that config.name names.

    No seed moves an image between training and validation; `seed` only draws the images that the pixel statistics of a
    streamed set are taken from. classes: of an image folder without labels (`load_image_folder`).
    TrainingError for an unknown name, missing or damaged files, or an image_size for a set of fixed size.
    """
    for prefix in _IN_A_FOLDER:
        if config.name.startswith(prefix):
            path = config.name.removeprefix(prefix)
            if not path:
                raise TrainingError(f"data.name is {prefix!r} without a path; write {prefix}PATH.")
            root = Path(path).expanduser()
            if prefix == SHARDS_PREFIX:
                return load_shards(root, config, seed=seed)
            return load_image_folder(root, config, seed=seed, classes=classes)
    if config.name not in _NAMED:
        raise TrainingError(_unknown(config.name))
    dataset = _NAMED[config.name](config)
    if config.image_size not in (0, dataset.height):
        raise TrainingError(
            f"data.image_size is {config.image_size}, but {config.name} has images of {dataset.width}x{dataset.height} "
            f"pixels; leave it 0 (image folders are the ones that are resized)."
        )
    return dataset


def _unknown(name: str) -> str:
    hint = ""
    spellings = {prefix.rstrip(":"): f"{prefix}PATH" for prefix in _IN_A_FOLDER} | {known: known for known in _NAMED}
    if close := difflib.get_close_matches(name.lower(), spellings, n=1):
        hint = f" Did you mean {spellings[close[0]]}?"
    if name and Path(name).expanduser().is_dir():
        shards = any((Path(name).expanduser() / TRAIN).glob("*.tar"))
        hint = f" It is a folder: write {SHARDS_PREFIX if shards else FOLDER_PREFIX}{name}."
    return f"data.name is {name!r}, which is no known data set.{hint} Choose one of {', '.join(available_datasets())}."
