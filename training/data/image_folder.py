"""A data set from an image folder: what size and colour it has, and whether it lives in memory or is streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from mecdeploy.training.config import DataConfig
from mecdeploy.training.data.decode import UnreadableImage, decode_many, find_unreadable, probe_image, raise_first
from mecdeploy.training.data.folder import FolderPart, ImageFolder, scan_folder, take_fraction
from mecdeploy.training.data.memory import MemorySource
from mecdeploy.training.data.source import UNKNOWN, ImageDataset, ImageSource
from mecdeploy.training.data.statistics import pixel_statistics
from mecdeploy.training.data.stream import StreamSource
from mecdeploy.training.data.unlabelled import KnownClasses, scan_unlabelled, with_classes
from mecdeploy.training.errors import TrainingError

SMALL_UP_TO = 64  # pixels: the side up to which images live in memory
LARGE_SIZE = 224
MEMORY_LIMIT = 8 << 30  # bytes of decoded pixels; more are streamed whatever their size
STATISTICS_SAMPLE = 1024  # images


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What every image is decoded to: 1 (grayscale) or 3 (RGB) channels, sides in pixels."""

    channels: int
    height: int
    width: int


def load_image_folder(
    root: Path, config: DataConfig, *, seed: int, classes: Callable[[Shape], KnownClasses] | None = None
) -> ImageDataset:
    """The images of a folder laid out as `scan_folder` expects; with config.labels none, as `scan_unlabelled` does.

    Images of at most 64 pixels a side are decoded now and kept in memory; larger ones are decoded by config.workers
    processes as they are needed. Grayscale images are never mirrored: they tend to be characters.
    With config.skip_bad_images, unreadable files are left out and listed in ImageDataset.skipped; to find them, every
    file is read once. seed draws the images that the pixel statistics of a streamed set are taken from.
    classes: of the teacher, for images of this shape; needed without labels.
    TrainingError as these, `with_classes` and `survey`, or if skipping leaves a class without training images.
    """
    scan = scan_folder if config.labels == "given" else scan_unlabelled
    folder = scan(root, validation_fraction=config.validation_fraction, carved=config.validation == "carved")
    shape = survey(folder, image_size=config.image_size, skip_unreadable=config.skip_bad_images)
    if config.labels == "none":
        if classes is None:
            raise TrainingError(f"data.labels is none, so nothing names the classes of {str(root)!r}; give classes=.")
        folder = with_classes(folder, root, classes(shape))
    skipped: tuple[str, ...] = ()
    if config.skip_bad_images:
        unreadable = find_unreadable(folder.paths, shape.channels)
        skipped = tuple(image.path for image in unreadable)
        folder = _without(folder, frozenset(skipped))
    folder = take_fraction(folder, root, config.fraction)
    flip = config.flip and shape.channels == 3
    train: ImageSource
    if _fits_in_memory(folder, shape):
        source: Callable[[FolderPart], ImageSource] = partial(_decode, shape=shape, flip=flip)
        train = source(folder.train)
        statistics = pixel_statistics(train.arrays()[0])
    else:
        source = partial(_stream, shape=shape, flip=flip, workers=config.workers)
        train = streamed = _stream(folder.train, shape, flip, config.workers)
        statistics = pixel_statistics(streamed.sample(STATISTICS_SAMPLE, seed))
    return ImageDataset(
        train=train,
        validation=source(folder.validation),
        test=None if folder.test is None else source(folder.test),
        class_names=folder.class_names,
        channels=shape.channels,
        height=shape.height,
        width=shape.width,
        pixel_mean=statistics[0],
        pixel_std=statistics[1],
        skipped=skipped,
        validation_labelled=UNKNOWN not in folder.validation.labels,
    )


def survey(folder: ImageFolder, *, image_size: int, skip_unreadable: bool) -> Shape:
    """Decide what the images are decoded to: grayscale only if all of them are; image_size, or else their own size.

    Images of different sizes become 224 x 224 if one of them is larger than 64 pixels, and need an image_size if not.
    Reads headers, and no more of them than it takes. TrainingError if an image_size is needed, UnreadableImage for a
    file that is no image unless skip_unreadable.
    """
    gray = True
    sizes: dict[tuple[int, int], str] = {}
    for path in folder.paths:
        try:
            height, width, is_gray = probe_image(path)
        except UnreadableImage:
            if skip_unreadable:
                continue
            raise
        gray = gray and is_gray
        sizes.setdefault((height, width), path)
        if not gray and (image_size or (len(sizes) > 1 and _largest(sizes) > SMALL_UP_TO)):
            break  # nothing that follows can change the answer
    channels = 1 if gray else 3
    if image_size:
        return Shape(channels=channels, height=image_size, width=image_size)
    if not sizes:
        raise TrainingError(
            f"none of the {len(folder.paths)} image files can be read, {folder.train.paths[0]!r} first of all."
        )
    (one, first), *others = sizes.items()
    if not others:
        return Shape(channels=channels, height=one[0], width=one[1])
    if _largest(sizes) > SMALL_UP_TO:
        return Shape(channels=channels, height=LARGE_SIZE, width=LARGE_SIZE)
    other, second = others[0]
    raise TrainingError(
        f"images differ in size: {first!r} is {one[1]}x{one[0]}, {second!r} is {other[1]}x{other[0]}. Set "
        f"data.image_size to the side they shall be resized to, such as {_largest(sizes)}."
    )


def _largest(sizes: Iterable[tuple[int, int]]) -> int:
    return max(max(size) for size in sizes)


def _fits_in_memory(folder: ImageFolder, shape: Shape) -> bool:
    size = len(folder.paths) * shape.channels * shape.height * shape.width
    return max(shape.height, shape.width) <= SMALL_UP_TO and size <= MEMORY_LIMIT


def _decode(part: FolderPart, shape: Shape, flip: bool) -> MemorySource:
    pixels, refused = decode_many(part.paths, channels=shape.channels, height=shape.height, width=shape.width)
    raise_first(refused)
    return MemorySource(pixels, np.asarray(part.labels), flip=flip)


def _stream(part: FolderPart, shape: Shape, flip: bool, workers: int) -> StreamSource:
    return StreamSource(
        part.paths,
        np.asarray(part.labels),
        channels=shape.channels,
        height=shape.height,
        width=shape.width,
        flip=flip,
        workers=workers,
    )


def _without(folder: ImageFolder, skipped: frozenset[str]) -> ImageFolder:
    """The folder without these files; TrainingError if a class has no training image left, or validation has none."""
    train, validation = (_part_without(part, skipped) for part in (folder.train, folder.validation))
    test = None if folder.test is None else _part_without(folder.test, skipped)
    if not train.paths:
        raise TrainingError(f"no training image can be read, {folder.train.paths[0]!r} first of all.")
    for label, name in enumerate(folder.class_names if folder.labelled else ()):
        if label not in train.labels:
            raise TrainingError(
                f"class {name!r} has no readable training image left; {len(skipped)} files cannot be read."
            )
    if not validation.paths:
        raise TrainingError(f"no validation image can be read, {folder.validation.paths[0]!r} first of all.")
    return replace(folder, train=train, validation=validation, test=test)


def _part_without(part: FolderPart, skipped: frozenset[str]) -> FolderPart:
    return part.only([index for index, path in enumerate(part.paths) if path not in skipped])
