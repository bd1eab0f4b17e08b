"""Image folders without labels: every image below train/, and classes that somebody else knows."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from mecdeploy.training.data.folder import (
    IMAGE_SUFFIXES,
    TRAIN,
    VALIDATION,
    FolderPart,
    ImageFolder,
    class_folders,
    images_below,
    is_visible,
    take_turns,
)
from mecdeploy.training.data.order import stratified_split
from mecdeploy.training.data.source import UNKNOWN
from mecdeploy.training.errors import TrainingError

LAYOUT = "PATH/train/** or PATH/**, with PATH/val/<class>/* or PATH/val/** if some are kept to validate with"


@dataclass(frozen=True, kw_only=True)
class KnownClasses:
    """The classes of a teacher, by index. named: whether these are their names, or numbers for want of names."""

    names: tuple[str, ...]
    named: bool


def scan_unlabelled(root: Path, *, validation_fraction: float, carved: bool) -> ImageFolder:
    """List the images below `root`/train, or below `root` where there is none, whatever folders they lie in.

    `root`/val (or validation, or test) validates: by its class folders, which class_names are; or without labels, if
    images lie in it directly. Without it, or if carved, `validation_fraction` of the images do, as chosen by the hash
    of their names. Labels that nobody gives are UNKNOWN. TrainingError for a folder that is missing or empty.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise TrainingError(f"{str(root)!r} {what}; data.name imagefolder:PATH needs a folder: {LAYOUT}.")
    present = [name for name in VALIDATION if (root / name).is_dir()]
    parent = root / TRAIN if (root / TRAIN).is_dir() else root
    if present and parent == root:
        raise TrainingError(f"{str(root)!r} holds {present[0]}/ but no train/; expected {LAYOUT}.")
    train = _without_labels(parent)
    names, given = _given(root / present[0]) if present else ((), None)
    if given is not None and not carved:
        return ImageFolder(class_names=names, train=train, validation=given)
    keys = [Path(path).relative_to(parent).as_posix() for path in train.paths]
    kept, held_out = stratified_split(train.labels, keys, round(validation_fraction * len(keys)))
    if not held_out:
        raise TrainingError(f"{str(parent)!r} holds one image, which leaves none to validate with; add images.")
    return ImageFolder(class_names=names, train=train.only(kept), validation=train.only(held_out), test=given)


def with_classes(folder: ImageFolder, root: Path, classes: KnownClasses) -> ImageFolder:
    """The folder with the teacher's classes, and with its indices for the images that lie in class folders.

    Names are compared where the teacher has names; else as many folders as it has classes are taken in their order, and
    name them. TrainingError where neither fits.
    """
    found, hint = folder.class_names, "or put the images into it without class folders, to validate by the teacher"
    if not found:
        return replace(folder, class_names=classes.names)
    if not classes.named:
        if len(found) != len(classes.names):
            raise TrainingError(
                f"{str(root)!r} has {len(found)} class folders to validate with, the weights have {len(classes.names)} "
                f"classes without names; make them as many, {hint}."
            )
        return folder
    if strangers := [name for name in found if name not in classes.names]:
        raise TrainingError(
            f"{str(root)!r} has the class folder {strangers[0]!r} to validate with, but the weights know no such class "
            f"({', '.join(classes.names[:5])}{', ...' if len(classes.names) > 5 else ''}); rename it, {hint}."
        )

    def renumbered(part: FolderPart) -> FolderPart:
        index = [classes.names.index(name) for name in found]
        return replace(part, labels=tuple(label if label == UNKNOWN else index[label] for label in part.labels))

    test = None if folder.test is None else renumbered(folder.test)
    return replace(folder, class_names=classes.names, validation=renumbered(folder.validation), test=test)


def _given(parent: Path) -> tuple[tuple[str, ...], FolderPart]:
    """Class names and images of a validation part; no names where images lie in it directly."""
    loose = any(is_visible(name) and Path(name).suffix.lower() in IMAGE_SUFFIXES for name in os.listdir(parent))
    if loose:
        return (), _without_labels(parent)
    classes = class_folders(parent)
    return tuple(classes), take_turns(classes)


def _without_labels(parent: Path) -> FolderPart:
    try:
        paths = tuple(sorted(images_below(parent)))
    except OSError as error:
        raise TrainingError(f"{error.filename!r} cannot be read: {error.strerror}.") from error
    if not paths:
        raise TrainingError(f"{str(parent)!r} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); add some.")
    return FolderPart(paths, (UNKNOWN,) * len(paths))
