"""Image folders: one folder a class, in train/ and val/ or all together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mecdeploy.training.data.order import stratified_fraction, stratified_split
from mecdeploy.training.data.source import UNKNOWN
from mecdeploy.training.errors import TrainingError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pbm", ".pgm", ".ppm", ".tif", ".tiff", ".webp"))
TRAIN = "train"
VALIDATION = ("val", "validation", "test")  # the first that exists is the validation part
LAYOUT = "PATH/train/<class>/* with PATH/val/<class>/*, or PATH/<class>/*"


@dataclass(frozen=True)
class FolderPart:
    """Image files and their class indices, the classes taking turns: first of each, second of each, ..."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]

    def only(self, indices: Sequence[int]) -> FolderPart:
        """The images with these indices."""
        return FolderPart(tuple(self.paths[i] for i in indices), tuple(self.labels[i] for i in indices))


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """What lies in an image folder, by name alone; no file has been opened. Labels nobody gives are UNKNOWN."""

    class_names: tuple[str, ...]
    train: FolderPart
    validation: FolderPart
    test: FolderPart | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """All image files."""
        return (*self.train.paths, *self.validation.paths, *(self.test.paths if self.test else ()))

    @property
    def labelled(self) -> bool:
        """Whether the training images have labels."""
        return UNKNOWN not in self.train.labels


def scan_folder(root: Path, *, validation_fraction: float, carved: bool = False) -> ImageFolder:
    """List the images of `root`/train and `root`/val (or validation, or test), or split the classes in `root` itself.

    A folder without a validation part gives `validation_fraction` of each class to one, by the hash of file names, so
    that neither a run's seed nor the folder's place moves an image from one part to the other. carved: so does one with
    a validation part, which becomes the test part.
    TrainingError, naming the folder, if it is missing or empty, has fewer than two classes, a class without images, or
    different classes in its two parts.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise TrainingError(f"{str(root)!r} {what}; data.name imagefolder:PATH needs a folder: {LAYOUT}.")
    present = [name for name in VALIDATION if (root / name).is_dir()]
    if not (root / TRAIN).is_dir():
        if present:
            raise TrainingError(f"{str(root)!r} holds {present[0]}/ but no train/; expected {LAYOUT}.")
        return _split(root, root, validation_fraction)
    if not present:
        return _split(root, root / TRAIN, validation_fraction)
    classes = class_folders(root / TRAIN)
    held_out = class_folders(root / present[0])
    for some, others, where in ((classes, held_out, present[0]), (held_out, classes, TRAIN)):
        if missing := sorted(set(some) - set(others)):
            raise TrainingError(
                f"{str(root / where)!r} has no class {missing[0]!r} ({len(missing)} of {len(some)} missing); train/ "
                f"and {present[0]}/ need the same class folders."
            )
    if carved:
        return replace(_split(root, root / TRAIN, validation_fraction), test=take_turns(held_out))
    return ImageFolder(class_names=tuple(classes), train=take_turns(classes), validation=take_turns(held_out))


def take_fraction(folder: ImageFolder, root: Path, fraction: float) -> ImageFolder:
    """The folder with that much of every class to train on, by the hash of file names below `root`.

    TrainingError for a class that no training image is left of.
    """
    if fraction == 1.0:  # names of all images of a large folder take seconds
        return folder
    train = folder.train
    keys = [Path(path).relative_to(root).as_posix() for path in train.paths]
    return replace(folder, train=train.only(stratified_fraction(train.labels, keys, fraction, folder.class_names)))


def _split(root: Path, parent: Path, fraction: float) -> ImageFolder:
    classes = class_folders(parent)
    part = take_turns(classes)
    keys = [Path(path).relative_to(parent).as_posix() for path in part.paths]
    kept, held_out = stratified_split(part.labels, keys, round(fraction * len(keys)))
    if not held_out:
        raise TrainingError(
            f"{str(root)!r} has one image a class, which leaves none to validate with; add images or a val/ folder."
        )
    return ImageFolder(class_names=tuple(classes), train=part.only(kept), validation=part.only(held_out))


def class_folders(parent: Path) -> dict[str, list[str]]:
    """Class name -> its image files sorted by path; classes sorted by name (so "10" comes before "2")."""
    try:
        names = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir() and is_visible(entry.name))
        classes = {name: sorted(images_below(parent / name)) for name in names}
    except OSError as error:
        raise TrainingError(f"{error.filename!r} cannot be read: {error.strerror}.") from error
    if not names:
        loose = any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in os.listdir(parent))
        what = "holds images but no class folders" if loose else "is empty: it holds no class folders"
        raise TrainingError(f"{str(parent)!r} {what}; expected {LAYOUT}.")
    for name, paths in classes.items():
        if not paths:
            raise TrainingError(
                f"{str(parent / name)!r} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); add some or remove it."
            )
    if len(classes) == 1:
        raise TrainingError(f"{str(parent)!r} holds only the class {names[0]!r}; a classifier needs at least two.")
    return classes


def images_below(folder: Path) -> Iterator[str]:
    """Image files at any depth, without hidden ones; linked folders are not entered, so that no loop is possible."""
    for entry in os.scandir(folder):
        if not is_visible(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from images_below(Path(entry.path))
        elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and not entry.is_dir():
            yield entry.path


def is_visible(name: str) -> bool:
    """Whether a file or folder is neither hidden nor what macOS puts into archives."""
    return not name.startswith(".") and name != "__MACOSX"


def take_turns(classes: dict[str, list[str]]) -> FolderPart:
    """Class name -> image files, as a part; classes are numbered in their order."""
    ranked = sorted(
        (position, label, path) for label, paths in enumerate(classes.values()) for position, path in enumerate(paths)
    )
    return FolderPart(tuple(path for *_, path in ranked), tuple(label for _, label, _ in ranked))
