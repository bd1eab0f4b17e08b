"""What lies in a tar shard of the WebDataset format: a walk through its headers."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecdeploy.training.data.decode import EncodedImage, UnreadableImage, open_image
from mecdeploy.training.errors import TrainingError

BLOCK = 512  # bytes; every member of a tar file starts at a multiple
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSION = "cls"
MOST_CLASSES = 1 << 20  # beyond that a label is taken for a mistake
COLUMNS = ("blocks", "sizes", "labels")
_META = re.compile(r"__[^/]*__($|/)")  # members that WebDataset's own reader passes over


@dataclass(frozen=True)
class Content:
    """What lies in a shard.

    columns: uint32 [3, n]: where an image's bytes start, in blocks; how many there are; its label.
    refused: SHARD/MEMBER of images that cannot be decoded.
    """

    columns: NDArray[np.uint32]
    refused: list[str]


def read_shard(path: Path, *, checked: bool) -> Content:
    """The images of a shard in order. checked: decode each one, and leave it out if that fails.

    TrainingError, naming shard and member, for a file that is no whole tar, a sample without exactly one image and a
    label, a label that is no class index, or a key that comes twice.
    """
    rows: list[tuple[int, int, int]] = []
    refused = []
    try:
        with open(path, "rb") as file:
            for name, block, size, label in _samples(path, file.fileno()):
                if checked and not _decodes(os.pread(file.fileno(), size, block * BLOCK)):
                    refused.append(f"{path.name}/{name}")
                else:
                    rows.append((block, size, label))
    except OSError as error:
        raise TrainingError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from None
    return Content(np.array(rows, np.uint32).reshape(-1, len(COLUMNS)).T, refused)


def member_name(shard: Path, block: int) -> str:
    """SHARD/MEMBER of the member whose bytes start at a block; walks through the shard."""
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.offset_data == block * BLOCK:
                    return f"{shard}/{member.name}"
    except (OSError, tarfile.TarError):
        pass  # damaged before it: the place says enough
    return f"{shard}/byte {block * BLOCK}"


def _decodes(data: bytes) -> bool:
    try:
        open_image(EncodedImage(data, str), channels=3, shrink=8)
    except UnreadableImage:
        return False
    return True


def _samples(path: Path, handle: int) -> Iterator[tuple[str, int, int, int]]:
    """Name, block, size and label of every image of a shard; which members make a sample is WebDataset's to say."""
    group_by_keys = _webdataset().group_by_keys
    seen = set()
    try:
        for sample in group_by_keys(_members(path)):
            key = sample["__key__"]
            if key in seen:
                raise TrainingError(
                    f"{str(path)!r} holds {key!r} twice; the members of a sample must follow each other, and no other "
                    f"sample of the shard may have its key."
                )
            seen.add(key)
            images = [extension for extension in IMAGE_EXTENSIONS if extension in sample]
            if len(images) != 1 or LABEL_EXTENSION not in sample:
                raise TrainingError(_incomplete(path, key, images, sample))
            image, label = sample[images[0]], sample[LABEL_EXTENSION]
            text = os.pread(handle, min(label.size, BLOCK), label.offset_data)
            yield image.name, image.offset_data // BLOCK, image.size, _label(path, label.name, text)
    except TrainingError:  # which is a ValueError too
        raise
    except ValueError as error:  # group_by_keys: one sample has two members of a name
        member = str(error.args[0]).rsplit(": duplicate", 1)[0]
        raise TrainingError(f"'{path}/{member}' occurs twice; write the shard again.") from None


def _members(path: Path) -> Iterator[dict[str, Any]]:
    """Every file of a shard, as WebDataset's functions pass them on, but with its TarInfo in place of its bytes."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                if member.isreg() and not _META.match(member.name):
                    yield {"fname": member.name, "data": member, "__url__": str(path)}
            end = tar.offset
    except (tarfile.TarError, ValueError) as error:  # ValueError: a damaged extended header
        raise TrainingError(
            f"{str(path)!r} is no whole, uncompressed tar file ({error}); copy or write it again."
        ) from None
    with open(path, "rb") as file:  # tarfile takes a damaged header, and a file that just stops, for the end
        file.seek(end)
        rest = file.read(1 << 20)
    if len(rest) < BLOCK or any(rest):
        raise TrainingError(
            f"{str(path)!r} is truncated or damaged: what follows byte {end} is not the end of a tar file. Copy or "
            f"write it again."
        )


def _label(path: Path, name: str, text: bytes) -> int:
    try:
        label = int(text)
    except ValueError:
        label = -1
    if not 0 <= label < MOST_CLASSES:
        shown = text[:20].decode("utf-8", "replace")
        raise TrainingError(
            f"'{path}/{name}' says {shown!r}; a label is a class index, counted from 0, as text (below {MOST_CLASSES})."
        )
    return label


def _incomplete(path: Path, key: str, images: list[str], sample: dict[str, Any]) -> str:
    members = ", ".join(sorted(name for name in sample if not name.startswith("__")))
    if len(images) == 1:
        what = f"has no label: there is no {key}.{LABEL_EXTENSION} next to it"
    elif images:
        what = f"has {len(images)} images"
    else:
        what = f"has no image ({', '.join(IMAGE_EXTENSIONS)})"
    return f"'{path}/{key}' {what}; its members: {members}."


def _webdataset() -> Any:
    try:
        from webdataset import tariterators
    except ImportError:
        raise TrainingError(
            "tar shards are indexed with the webdataset package, which is not installed: "
            "pip install 'mecdeploy[shards]'."
        ) from None
    return tariterators
