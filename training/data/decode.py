"""From an image file to uint8 pixels, with Pillow and numpy alone."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mecdeploy.training.data.geometry import covering_size, random_resized_box
from mecdeploy.training.errors import TrainingError

_DEEP_GRAY = ("I", "I;16", "I;16L", "I;16B")  # 16 bits; which of these a PNG opens as depends on Pillow's version
_GRAY = ("1", "L", "LA", *_DEEP_GRAY)
_CHUNK = 256  # images per task: below that, passing tasks to threads costs as much as decoding 32x32 JPEGs


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of an image file that lies inside another file. name: asked what it is called, once that matters."""

    data: bytes
    name: Callable[[], str]


ImageFile = str | os.PathLike[str] | EncodedImage


class ImageFiles(Protocol):
    """Image files by index. It is sent to worker processes, and must pickle small."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int, /) -> ImageFile:
        """One of them; TrainingError if the file around it cannot be read."""
        ...


class UnreadableImage(TrainingError):
    """An image file that cannot be decoded. path: the file. reason: why, in a few words."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(
            f"{path!r} is no readable image ({reason}). Replace or remove it, or leave such files out with "
            f"--skip-bad-images (data.skip_bad_images = true)."
        )

    def __reduce__(self) -> tuple[type[UnreadableImage], tuple[str, str]]:
        return type(self), (self.path, self.reason)


def decode_image(file: ImageFile, *, channels: int, height: int, width: int) -> NDArray[np.uint8]:
    """The pixels that validation and deployment see: uint8 [channels, height, width].

    The rule, for whoever has to repeat it (with Pillow; nothing else happens, EXIF orientation is not applied):
    1. First frame. 16-bit grayscale (modes I, I;16*): clip to 0..65535, keep the high byte, now mode L. A palette
       with transparency becomes RGBA. Then convert("L") for 1 channel or convert("RGB") for 3, which drops alpha.
    2. If the size is already height x width, the pixels are untouched.
    3. Else resize with BILINEAR (Pillow's, which averages when it shrinks) to the smallest size that covers
       height x width at the image's aspect ratio: if w * height >= h * width, to (height, w * height / h), otherwise
       to (h * width / w, width), rounded half up in integers. For a square target that is "shorter side to size".
    4. Cut out the centre: top = (resized height - height) // 2, left = (resized width - width) // 2.
    UnreadableImage (a TrainingError) if the file cannot be decoded.
    """
    image = open_image(file, channels)
    size = (image.height, image.width)
    if size != (height, width):
        resized = covering_size(size, (height, width))
        image = image.resize((resized[1], resized[0]), Image.Resampling.BILINEAR)
        top, left = (resized[0] - height) // 2, (resized[1] - width) // 2
        image = image.crop((left, top, left + width, top + height))
    return _channels_first(image)


def decode_augmented(
    file: ImageFile, *, channels: int, height: int, width: int, views: int, flip: bool, draw: random.Random
) -> NDArray[np.uint8]:
    """Random resized crops of one image, mirrored half of the time if flip: uint8 [views, channels, height, width].

    View k depends on the state of `draw` and on k alone, not on how many views are asked for. A JPEG is decoded at a
    half, a quarter or an eighth of its size where its crop still has as many pixels then as it is resized to.
    """
    full_height, full_width, _ = probe_image(file)
    images: dict[int, Image.Image] = {}  # by how much they are shrunk
    cut = []
    for _ in range(views):
        box = random_resized_box((full_height, full_width), (height, width), draw)
        mirrored = draw.random() < 0.5
        shrink = _largest_shrink(box, height, width)
        if shrink not in images:
            images[shrink] = open_image(file, channels, shrink=shrink)
        image = images[shrink]
        across, down = image.width / full_width, image.height / full_height  # 1, or close to 1 / shrink
        scaled = (
            box[0] * across,
            box[1] * down,
            min(box[2] * across, image.width),
            min(box[3] * down, image.height),
        )
        pixels = _channels_first(image.resize((width, height), Image.Resampling.BILINEAR, box=scaled))
        cut.append(pixels[:, :, ::-1] if mirrored and flip else pixels)
    return np.stack(cut)


def decode_many(
    files: ImageFiles, *, channels: int, height: int, width: int
) -> tuple[NDArray[np.uint8], list[UnreadableImage]]:
    """`decode_image` of every file, on all cores: uint8 [n, channels, height, width] and what could not be read.

    The row of an unreadable image is zeros.
    """
    pixels = np.zeros((len(files), channels, height, width), np.uint8)

    def decode(index: int) -> None:
        pixels[index] = decode_image(files[index], channels=channels, height=height, width=width)

    return pixels, _for_each(len(files), decode)


def raise_first(refused: Sequence[UnreadableImage]) -> None:
    """Raise the first of the unreadable images, if there is one, saying how many others there are."""
    if refused:
        more = f"; {len(refused) - 1} more cannot be read either" if len(refused) > 1 else ""
        raise UnreadableImage(refused[0].path, refused[0].reason + more)


def find_unreadable(files: ImageFiles, channels: int) -> list[UnreadableImage]:
    """Every file that `open_image` refuses, by reading each to its end, on all cores."""
    return _for_each(len(files), lambda index: open_image(files[index], channels, shrink=8))


def probe_image(file: ImageFile) -> tuple[int, int, bool]:
    """Height, width and whether the image is grayscale (1, 8 or 16 bits, with or without alpha), from its header."""
    with _refusals(file), Image.open(_readable(file)) as image:
        return image.height, image.width, image.mode in _GRAY


def open_image(file: ImageFile, channels: int, *, shrink: int = 1) -> Image.Image:
    """Decode a whole file to mode L (1 channel) or RGB (3). shrink: 1, 2, 4 or 8; a JPEG may be smaller by that."""
    mode = "L" if channels == 1 else "RGB"
    with _refusals(file), Image.open(_readable(file)) as opened:
        if shrink > 1:
            opened.draft(None, (max(1, opened.width // shrink), max(1, opened.height // shrink)))
        image: Image.Image = opened
        if image.mode in _DEEP_GRAY:
            image = Image.fromarray((np.clip(np.asarray(image), 0, 0xFFFF) >> 8).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("32-bit float pixels have no 8-bit meaning")
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        image.load()
        return image if image.mode == mode else image.convert(mode)


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _largest_shrink(box: tuple[int, int, int, int], height: int, width: int) -> int:
    """By how much an image may be shrunk such that its box (left, top, right, bottom) is no smaller than the target."""
    left, top, right, bottom = box
    return max((by for by in (2, 4, 8) if right - left >= by * width and bottom - top >= by * height), default=1)


def _readable(file: ImageFile) -> str | os.PathLike[str] | io.BytesIO:
    return io.BytesIO(file.data) if isinstance(file, EncodedImage) else file


def _name(file: ImageFile) -> str:
    return file.name() if isinstance(file, EncodedImage) else os.fspath(file)


@contextmanager
def _refusals(file: ImageFile) -> Iterator[None]:
    try:
        yield
    except (MemoryError, UnreadableImage):
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(_name(file), "of no known image format") from None
    except Exception as error:  # Pillow's decoders raise nearly every type there is for a damaged file
        lines = str(getattr(error, "strerror", None) or error).splitlines()
        raise UnreadableImage(_name(file), lines[0] if lines else type(error).__name__) from None


def _channels_first(image: Image.Image) -> NDArray[np.uint8]:
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _for_each(count: int, work: Callable[[int], object]) -> list[UnreadableImage]:
    """Call work(index) for every index on threads (Pillow decodes outside the lock); what was unreadable, in order."""

    def run(first: int) -> list[UnreadableImage]:
        refused = []
        for index in range(first, min(first + _CHUNK, count)):
            try:
                work(index)
            except UnreadableImage as error:
                refused.append(error)
        return refused

    pool = ThreadPoolExecutor(usable_cores())
    try:
        return [error for refused in pool.map(run, range(0, count, _CHUNK)) for error in refused]
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C stops at once
