"""The data sets with a name: scikit-learn's digits, which need no network, and three that torchvision downloads."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecdeploy.training.config import DataConfig
from mecdeploy.training.data.memory import MemorySource
from mecdeploy.training.data.order import stratified_fraction, stratified_split
from mecdeploy.training.data.source import UNKNOWN, ImageDataset
from mecdeploy.training.data.statistics import pixel_statistics
from mecdeploy.training.errors import TrainingError

DIGITS_VALIDATION = 360  # of 1797


def load_digits(config: DataConfig) -> ImageDataset:
    """Handwritten digits 0..9, 8x8 grayscale: 1437 images to train on, 360 to validate or test, always the same ones.

    The 17 gray levels 0..16 become the pixels 0, 15, ..., 240. Never mirrored.
    Source: Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits", test part, as in scikit-learn.
    """
    from sklearn import datasets  # half a second that no other data set needs

    digits = datasets.load_digits()
    pixels = (digits.images * 15).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    train, validation = stratified_split(labels.tolist(), range(len(labels)), DIGITS_VALIDATION)
    return _in_memory(
        (pixels[train], labels[train]),
        (pixels[validation], labels[validation]),
        [str(i) for i in range(10)],
        config,
        flip=False,
    )


def load_cifar10(config: DataConfig) -> ImageDataset:
    """CIFAR-10: 50,000 and 10,000 RGB images of 32x32, 10 classes. Source: Krizhevsky 2009."""
    return _from_torchvision("CIFAR10", config)


def load_cifar100(config: DataConfig) -> ImageDataset:
    """CIFAR-100: 50,000 and 10,000 RGB images of 32x32, 100 classes. Source: Krizhevsky 2009."""
    return _from_torchvision("CIFAR100", config)


def load_fashion_mnist(config: DataConfig) -> ImageDataset:
    """Fashion-MNIST: 60,000 and 10,000 grayscale images of 28x28, 10 classes. Source: arXiv:1708.07747."""
    return _from_torchvision("FashionMNIST", config)


def _from_torchvision(kind: str, config: DataConfig) -> ImageDataset:
    """Both parts of a torchvision data set; TrainingError, saying where files belong, if they cannot be had."""
    import torchvision.datasets as zoo

    source = getattr(zoo, kind)
    if kind.startswith("CIFAR"):
        place, origin = source.base_folder, source.url
    else:
        place, origin = f"{kind}/raw", source.mirrors[0]
    try:
        with warnings.catch_warnings():
            # numpy 2.4.0 to 2.4.4 warn of a dtype's flags as CIFAR's old pickles spell them (numpy#31177).
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
            train, validation = (source(config.root, train=part, download=config.download) for part in (True, False))
    except Exception as error:  # whatever urllib, tarfile, pickle and torchvision raise
        lines = str(getattr(error, "reason", None) or error).splitlines()
        why = lines[0].split(". ")[0] if lines else type(error).__name__  # torchvision's advice has its own words
        wanted = "Allow network access once" if config.download else "Set data.download = true"
        raise TrainingError(
            f"{config.name}: no intact copy at '{config.root}/{place}' and none could be made ({why}). {wanted}, or "
            f"put the unpacked files of {origin} there; data.root sets the folder."
        ) from error
    return _in_memory(_pixels(train), _pixels(validation), train.classes, config, flip=config.flip)


def _pixels(part: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [n, C, H, W] and labels of a torchvision data set, which holds [n, H, W, 3] or [n, H, W]."""
    pixels = np.asarray(part.data, np.uint8)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels), np.asarray(part.targets, np.int64)


def _in_memory(
    train: tuple[NDArray[np.uint8], NDArray[np.int64]],
    given: tuple[NDArray[np.uint8], NDArray[np.int64]],
    class_names: Sequence[str],
    config: DataConfig,
    *,
    flip: bool,
) -> ImageDataset:
    """The data set as config wants it split. given: its validation images, or the test images if these are carved."""
    validation, carved = given, config.validation == "carved"
    if carved:
        groups = _groups(train[1], config)
        count = len(groups)
        kept, held_out = stratified_split(groups, range(count), round(config.validation_fraction * count))
        train, validation = _chosen(train, kept), _chosen(train, held_out)
    if config.fraction < 1.0:
        groups = _groups(train[1], config)
        train = _chosen(train, stratified_fraction(groups, range(len(groups)), config.fraction, class_names))
    mean, std = pixel_statistics(train[0])
    _, channels, height, width = train[0].shape
    return ImageDataset(
        train=MemorySource(*train, flip=flip),
        validation=MemorySource(*validation, flip=flip),
        test=MemorySource(*given, flip=flip) if carved else None,
        class_names=tuple(class_names),
        channels=channels,
        height=height,
        width=width,
        pixel_mean=mean,
        pixel_std=std,
    )


def _chosen(
    part: tuple[NDArray[np.uint8], NDArray[np.int64]], indices: list[int]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return part[0][indices], part[1][indices]


def _groups(labels: NDArray[np.int64], config: DataConfig) -> list[int]:
    """What images are chosen by: their classes, or nothing where labels are not to be looked at."""
    return [UNKNOWN] * len(labels) if config.labels == "none" else labels.tolist()
