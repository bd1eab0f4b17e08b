"""Carved validation, the test part that it leaves, and fractions of the training images."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torchvision.datasets
from hypothesis import given
from hypothesis import strategies as st
from image_folders import fill
from image_folders import load as load_folder

from mecdeploy.training.config import DataConfig
from mecdeploy.training.data import ImageDataset, ImageSource, load_dataset
from mecdeploy.training.data.memory import MemorySource
from mecdeploy.training.data.order import stratified_fraction
from mecdeploy.training.data.stream import StreamSource
from mecdeploy.training.errors import TrainingError


def load(name: str, *, seed: int = 0, **options: Any) -> ImageDataset:
    return load_dataset(DataConfig(name=name, **options), seed=seed)


def images(source: ImageSource | None) -> list[bytes]:
    """Every image with its label, as bytes."""
    assert source is not None
    return [bytes([label]) + image.tobytes() for image, label in zip(*source.arrays(), strict=True)]


# digits and torchvision's


def test_carved_digits_leave_what_validates_otherwise_as_the_test_part() -> None:
    usual = load("digits")
    data = load("digits", validation="carved")
    assert usual.test is None
    assert images(data.test) == images(usual.validation)
    assert (len(data.train), len(data.validation)) == (1437 - 144, 144)
    assert Counter(images(data.train) + images(data.validation)) == Counter(images(usual.train))
    whole = np.bincount(usual.train.labels.numpy())
    assert np.abs(np.bincount(data.validation.labels.numpy()) - whole * 144 / 1437).max() < 1


def test_no_seed_moves_an_image() -> None:
    options = {"validation": "carved", "validation_fraction": 0.2, "fraction": 0.3}
    one, two = (load("digits", seed=seed, **options) for seed in (0, 7))
    for part in ("train", "validation", "test"):
        assert images(getattr(one, part)) == images(getattr(two, part))


@pytest.mark.parametrize("validation", ["given", "carved"])
def test_a_fraction_moves_neither_validation_nor_test_and_lies_within_a_larger_one(validation: str) -> None:
    whole, tenth, hundredth = (load("digits", validation=validation, fraction=part) for part in (1.0, 0.1, 0.01))
    for data in (tenth, hundredth):
        assert images(data.validation) == images(whole.validation)
        assert data.test is None if whole.test is None else images(data.test) == images(whole.test)
    assert set(images(hundredth.train)) < set(images(tenth.train)) < set(images(whole.train))
    counts, of = np.bincount(tenth.train.labels.numpy()), np.bincount(whole.train.labels.numpy())
    assert np.abs(counts - of / 10).max() <= 0.5
    assert np.bincount(hundredth.train.labels.numpy()).tolist() == [1] * 10
    pixels = tenth.train.arrays()[0].astype(np.float64)
    # Both are float64 sums of the same 8000 integers; the order of summation is all that differs.
    assert (tenth.pixel_mean, tenth.pixel_std) == pytest.approx((pixels.mean(), pixels.std()), rel=1e-12)


@pytest.mark.parametrize(("name", "kind"), [("cifar10", "CIFAR10"), ("fashion-mnist", "FashionMNIST")])
def test_a_torchvision_set_is_carved(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    shape = (8, 8, 3) if kind.startswith("CIFAR") else (8, 8)

    def part(root: str, *, train: bool, download: bool) -> SimpleNamespace:
        count = 60 if train else 20
        targets = [index % 2 for index in range(count)]
        return SimpleNamespace(
            data=rng.integers(0, 256, (count, *shape), np.uint8), targets=targets, classes=["odd", "even"]
        )

    source = getattr(torchvision.datasets, kind)
    part.base_folder, part.url, part.mirrors = "there", "here", ["here"]  # type: ignore[attr-defined]
    monkeypatch.setattr(torchvision.datasets, source.__name__, part)
    data = load(name, validation="carved", fraction=0.5)
    assert (len(data.train), len(data.validation)) == (28, 6)  # 27 of each class are left of 30; 13.5 rounds up
    assert data.test is not None and len(data.test) == 20


# Folders


@pytest.mark.parametrize(("size", "kind"), [((10, 10), MemorySource), ((70, 70), StreamSource)])
def test_a_folder_is_carved(tmp_path: Path, size: tuple[int, int], kind: type) -> None:
    fill(tmp_path / "train", {"a": 20, "b": 10}, size=size)
    fill(tmp_path / "val", {"a": 2, "b": 1}, size=size)
    usual = load_folder(tmp_path)
    data = load_folder(tmp_path, validation="carved", validation_fraction=0.2, fraction=0.5)
    whole = load_folder(tmp_path, validation="carved", validation_fraction=0.2)
    assert isinstance(data.train, kind) and isinstance(data.test, kind)
    assert images(data.test) == images(usual.validation)
    assert Counter(data.validation.labels.tolist()) == {0: 4, 1: 2}
    assert Counter(data.train.labels.tolist()) == {0: 8, 1: 4}
    assert images(data.validation) == images(whole.validation)
    assert set(images(data.train)) < set(images(whole.train))
    assert set(images(whole.train)) | set(images(whole.validation)) == set(images(usual.train))
    assert len(whole.train) + len(whole.validation) == len(usual.train)


def test_a_folder_without_a_part_is_carved_as_ever(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 20, "b": 10})
    given, carved = (load_folder(tmp_path, validation=validation) for validation in ("given", "carved"))
    assert images(given.validation) == images(carved.validation) and carved.test is None


def test_the_test_part_needs_the_same_classes(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 20, "b": 10})
    fill(tmp_path / "val", {"a": 2, "c": 2})
    with pytest.raises(TrainingError, match="need the same class folders"):
        load_folder(tmp_path, validation="carved")


def test_unreadable_test_images_are_left_out_too(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 20, "b": 10})
    fill(tmp_path / "val", {"a": 2, "b": 2})
    (tmp_path / "val" / "a" / "000.png").write_bytes(b"no image")
    data = load_folder(tmp_path, validation="carved", skip_bad_images=True)
    assert data.skipped == (str(tmp_path / "val" / "a" / "000.png"),)
    assert data.test is not None and len(data.test) == 3


# Fractions by themselves


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), one=st.floats(0.5, 1), two=st.floats(0.5, 1))
def test_fractions_are_nested_and_rounded(sizes: list[int], one: float, two: float) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    small, large = (
        stratified_fraction(labels, range(len(labels)), fraction, "abcde") for fraction in sorted((one, two))
    )
    assert set(small) <= set(large) and large == sorted(large)
    counts = Counter(labels[index] for index in large)
    for label, size in enumerate(sizes):
        assert abs(counts[label] - max(one, two) * size) <= 0.5


def test_the_hash_ranks_the_fraction() -> None:
    keys = ["a", "b", "c", "d", "e"]

    def rank(key: str) -> int:
        parts = (b"sfraction", b"s" + key.encode())
        message = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") // 2

    chosen = stratified_fraction([0] * 5, keys, 0.4, ["x"])
    assert {keys[index] for index in chosen} == set(sorted(keys, key=rank)[:2])


# Refusals


def refusal(name: str, **options: Any) -> str:
    with pytest.raises(TrainingError) as caught:
        load(name, **options)
    return str(caught.value)


def test_a_class_without_an_image_is_refused_with_a_fraction_that_leaves_every_class_one() -> None:
    message = refusal("digits", fraction=0.001)
    assert message == (
        "data.fraction is 0.001, which leaves class '0' none of its 142 training images; make it at least 0.0036."
    )
    assert len(set(load("digits", fraction=0.0036).train.labels.tolist())) == 10


@pytest.mark.parametrize("fraction", [0.0, 1.5, -0.1, float("nan")])
def test_fractions_out_of_range(fraction: float) -> None:
    assert refusal("digits", fraction=fraction) == (
        f"data.fraction is {fraction}; it must be more than 0 and at most 1."
    )


def test_other_words_for_validation() -> None:
    assert refusal("digits", validation="split") == "data.validation is 'split'; choose one of given, carved."


def test_shards_are_taken_as_they_are(tmp_path: Path) -> None:
    assert refusal(f"shards:{tmp_path}", validation="carved") == (
        "data.validation is 'carved', but shards are taken as they are; move some of them to another folder, and leave "
        "data.validation at 'given'."
    )
    assert refusal(f"shards:{tmp_path}", fraction=0.1).startswith("data.fraction is 0.1, but shards are taken as")
