"""A data set from tar shards in the WebDataset format: for images too many for files of their own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mecdeploy.training.config import DataConfig
from mecdeploy.training.data.decode import UnreadableImage, probe_image
from mecdeploy.training.data.folder import TRAIN, VALIDATION
from mecdeploy.training.data.image_folder import LARGE_SIZE, STATISTICS_SAMPLE, Shape
from mecdeploy.training.data.shards_index import ShardIndex, open_index
from mecdeploy.training.data.shards_reading import ShardFiles, ShardOrder
from mecdeploy.training.data.source import ImageDataset
from mecdeploy.training.data.statistics import pixel_statistics
from mecdeploy.training.data.stream import StreamSource
from mecdeploy.training.errors import TrainingError

SHARD_LAYOUT = "PATH/train/*.tar with PATH/val/*.tar"
CLASSES_FILE = "classes.txt"
COLOUR_SAMPLE = 256  # images that are asked whether they are grayscale
_CHUNK = 1 << 24  # labels looked at together: as an index, each takes 8 bytes


def load_shards(root: Path, config: DataConfig, *, seed: int) -> ImageDataset:
    """The images of root/train/*.tar and root/val (or validation, or test)/*.tar, always streamed.

    root/classes.txt names the classes, one a line; without it they are called "0" to the largest label there is.
    config.image_size 0 means 224. Grayscale if every one of COLOUR_SAMPLE images, spread evenly over train, is. With
    config.skip_bad_images every image is decoded once, when the shards are indexed. seed draws the images that the
    pixel statistics are taken from.
    TrainingError for a config that carves or takes a fraction, a missing part, shards as `open_index` refuses them, a
    label without a class, or a class without training images.
    """
    for key, value, default in (("validation", config.validation, "given"), ("fraction", config.fraction, 1.0)):
        if value != default:
            raise TrainingError(
                f"data.{key} is {value!r}, but shards are taken as they are; move some of them to another folder, and "
                f"leave data.{key} at {default!r}."
            )
    parts = {part: _open(root / part, config) for part in (TRAIN, _validation_part(root))}
    train, validation = parts.values()
    class_names = _class_names(root, parts)
    side = config.image_size or LARGE_SIZE
    shape = Shape(channels=1 if _is_gray(ShardFiles(train)) else 3, height=side, width=side)
    flip = config.flip and shape.channels == 3
    source = _stream(train, shape, flip, config.workers)
    mean, std = pixel_statistics(source.sample(STATISTICS_SAMPLE, seed))
    return ImageDataset(
        train=source,
        validation=_stream(validation, shape, flip, config.workers),
        class_names=class_names,
        channels=shape.channels,
        height=shape.height,
        width=shape.width,
        pixel_mean=mean,
        pixel_std=std,
        skipped=tuple(str(index.folder / name) for index in parts.values() for name in index.refused),
    )


def _validation_part(root: Path) -> str:
    """Which folder validates."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise TrainingError(f"{str(root)!r} {what}; data.name shards:PATH needs a folder: {SHARD_LAYOUT}.")
    if not (root / TRAIN).is_dir():
        raise TrainingError(f"{str(root)!r} holds no train/; expected {SHARD_LAYOUT}.")
    present = [name for name in VALIDATION if (root / name).is_dir()]
    if not present:
        raise TrainingError(
            f"{str(root)!r} holds no val/ (or {', '.join(VALIDATION[1:])}/). Nothing is held out here, since "
            f"shards may be sorted by class: move some, with images of every class, from train/ to val/."
        )
    return present[0]


def _open(folder: Path, config: DataConfig) -> ShardIndex:
    index = open_index(folder, checked=config.skip_bad_images, workers=config.workers)
    if not len(index.labels):
        why = f"none of its {len(index.refused)} images can be read" if index.refused else "its shards are empty"
        raise TrainingError(f"{str(folder)!r} holds no images: {why}.")
    return index


def _class_names(root: Path, parts: dict[str, ShardIndex]) -> tuple[str, ...]:
    """The names of the classes; TrainingError if the labels do not fit them."""
    file = root / CLASSES_FILE
    if file.exists():
        names = _read_names(file)
    else:
        names = tuple(str(label) for label in range(1 + max(int(index.labels.max()) for index in parts.values())))
    if len(names) < 2:
        raise TrainingError(f"{str(root)!r} holds only the class {''.join(names)!r}; a classifier needs at least two.")
    for index in parts.values():
        largest = int(index.labels.argmax())
        if index.labels[largest] >= len(names):
            raise TrainingError(
                f"{ShardFiles(index).name(largest)!r} has label {index.labels[largest]}, but {str(file)!r} names "
                f"{len(names)} classes, 0 to {len(names) - 1}."
            )
    if len(empty := np.flatnonzero(~_present(parts[TRAIN].labels, len(names)))):
        raise TrainingError(
            f"class {int(empty[0])} ({names[empty[0]]!r}) has no image in {str(root / TRAIN)!r} ({len(empty)} of "
            f"{len(names)} classes have none); labels are counted from 0."
        )
    return names


def _read_names(file: Path) -> tuple[str, ...]:
    """The lines of a file; TrainingError for an empty one or one that comes twice."""
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8").rstrip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{str(file)!r} cannot be read as UTF-8 text: {error}.") from None
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise TrainingError(f"{str(file)!r}: line {number} is empty; each line names a class.")
        if first.setdefault(name, number) != number:
            raise TrainingError(f"{str(file)!r} holds {name!r} twice, in lines {first[name]} and {number}.")
    return names


def _present(labels: NDArray[np.uint32], classes: int) -> NDArray[np.bool_]:
    """Which classes have an image, bool [classes]."""
    present = np.zeros(classes, bool)
    for first in range(0, len(labels), _CHUNK):
        present[labels[first : first + _CHUNK]] = True
    return present


def _is_gray(files: ShardFiles) -> bool:
    for image in np.unique(np.linspace(0, len(files) - 1, COLOUR_SAMPLE).astype(np.int64)).tolist():
        try:
            if not probe_image(files[image])[2]:
                return False
        except UnreadableImage:
            continue  # named when it is decoded
    return True


def _stream(index: ShardIndex, shape: Shape, flip: bool, workers: int) -> StreamSource:
    return StreamSource(
        ShardFiles(index),
        index.labels,
        channels=shape.channels,
        height=shape.height,
        width=shape.width,
        flip=flip,
        workers=workers,
        order=partial(ShardOrder, index.ends),
    )
