"""Image folders: what is found in them and what it becomes. What can be wrong: test_data_folder_errors.py."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import fill, load, put
from PIL import Image

from mecdeploy.training.data import ImageDataset, decode_image
from mecdeploy.training.data.folder import scan_folder
from mecdeploy.training.data.image_folder import Shape, survey
from mecdeploy.training.data.memory import MemorySource
from mecdeploy.training.data.stream import StreamSource
from mecdeploy.training.errors import TrainingError

# What is found


@pytest.mark.parametrize("part", ["val", "validation", "test"])
def test_two_parts(tmp_path: Path, part: str) -> None:
    fill(tmp_path / "train", {"cat": 3, "ant": 4})
    fill(tmp_path / part, {"ant": 1, "cat": 2})
    data = load(tmp_path)
    assert data.class_names == ("ant", "cat")
    assert (len(data.train), len(data.validation)) == (7, 3)
    assert (data.channels, data.height, data.width) == (3, 10, 10)
    assert data.skipped == ()
    for source, where in ((data.train, "train"), (data.validation, part)):
        pixels, labels = source.arrays()
        for image, label in zip(pixels, labels, strict=True):
            folder = tmp_path / where / data.class_names[label]
            originals = [decode_image(path, channels=3, height=10, width=10) for path in folder.iterdir()]
            assert sum(np.array_equal(image, original) for original in originals) == 1
        assert len({image.tobytes() for image in pixels}) == len(pixels)


def test_val_comes_before_validation_before_test(tmp_path: Path) -> None:
    for count, part in enumerate(("train", "test", "validation", "val"), start=1):
        fill(tmp_path / part, {"a": count, "b": count})
        if count > 1:
            assert len(load(tmp_path).validation) == 2 * count


def test_the_classes_take_turns(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 2, "b": 4, "c": 3})
    fill(tmp_path / "val", {"a": 1, "b": 1, "c": 1})
    folder = scan_folder(tmp_path, validation_fraction=0.1)
    assert folder.train.labels == (0, 1, 2, 0, 1, 2, 1, 2, 1)
    assert [Path(path).name for path in folder.train.paths] == [f"{i:03}.png" for i in (0, 0, 0, 1, 1, 1, 2, 2, 3)]
    assert folder.validation.labels == (0, 1, 2)


@pytest.mark.parametrize("inside", ["", "train"])
def test_one_part_is_split_by_class(tmp_path: Path, inside: str) -> None:
    fill(tmp_path / inside, {"a": 20, "b": 10, "c": 1})
    data = load(tmp_path, validation_fraction=0.2)
    assert Counter(data.train.labels.tolist()) == {0: 16, 1: 8, 2: 1}
    assert Counter(data.validation.labels.tolist()) == {0: 4, 1: 2}
    images = [image.tobytes() for source in (data.train, data.validation) for image in source.arrays()[0]]
    assert len(set(images)) == 31


def test_a_split_ignores_the_runs_seed_and_the_folders_place(tmp_path: Path) -> None:
    fill(tmp_path / "one", {"a": 20, "b": 20})
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "train")
    expected = load(tmp_path / "one", seed=0).validation.arrays()[0]
    assert np.array_equal(load(tmp_path / "one", seed=1).validation.arrays()[0], expected)
    assert np.array_equal(load(tmp_path / "two", seed=0).validation.arrays()[0], expected)


def test_what_is_no_image_is_not_looked_at(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 4, "b": 4})
    put(tmp_path / "a" / "deep" / "er" / "x.png")
    put(tmp_path / "a" / "UPPER.PNG")
    for name in ("a/notes.txt", "a/Thumbs.db", "a/.hidden.png", "a/._x.jpg", "readme.md", "loose.png"):
        (tmp_path / name).write_text("no pixels")
    for name in (".git", "__MACOSX"):
        put(tmp_path / name / "x.png")
    (tmp_path / "a" / "folder.png").mkdir()
    (tmp_path / "b" / "round").symlink_to(tmp_path / "b")
    data = load(tmp_path)
    assert data.class_names == ("a", "b")
    assert len(data.train) + len(data.validation) == 10


def test_a_class_may_be_a_link(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", {"x": 3})
    fill(tmp_path / "root", {"a": 3})
    (tmp_path / "root" / "b").symlink_to(tmp_path / "elsewhere" / "x")
    assert load(tmp_path / "root").class_names == ("a", "b")


def test_odd_names_are_names(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9 \n'x'.png")  # no UTF-8, a line break, quotes
    try:
        put(tmp_path / "a b" / "x.png").rename(tmp_path / "a b" / odd)
    except OSError:
        pytest.skip("this file system only takes UTF-8")
    fill(tmp_path, {"a b": 3, "Ünï": 4})
    data = load(tmp_path)
    assert data.class_names == ("a b", "Ünï") and len(data.train) + len(data.validation) == 8
    (tmp_path / "a b" / odd).write_bytes(b"")
    with pytest.raises(TrainingError) as caught:
        load(tmp_path)
    assert r"caf\udce9 \n" in str(caught.value)
    str(caught.value).encode()  # can be printed


def test_a_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "pets", {"a": 3, "b": 3})
    assert load(Path("~/pets")).class_names == ("a", "b")


# What it becomes


def test_small_images_live_in_memory_and_large_ones_are_streamed(tmp_path: Path) -> None:
    fill(tmp_path / "small", {"a": 3, "b": 3}, size=(64, 20))
    fill(tmp_path / "large", {"a": 3, "b": 3}, size=(65, 20))
    small, large = load(tmp_path / "small"), load(tmp_path / "large")
    assert isinstance(small.train, MemorySource) and isinstance(small.validation, MemorySource)
    assert (small.height, small.width) == (64, 20)
    assert isinstance(large.train, StreamSource) and isinstance(large.validation, StreamSource)
    assert (large.height, large.width) == (65, 20)


def test_image_size_decides_over_the_images_own(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 3}, size=(70, 90))
    small = load(tmp_path, image_size=24)
    assert isinstance(small.train, MemorySource) and (small.height, small.width) == (24, 24)
    assert isinstance(load(tmp_path, image_size=80).train, StreamSource)
    path = scan_folder(tmp_path, validation_fraction=0.1).train.paths[0]
    assert np.array_equal(small.train.arrays(1)[0][0], decode_image(path, channels=3, height=24, width=24))


def test_more_than_memory_holds_is_streamed_with_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, {"a": 9, "b": 9})
    held = load(tmp_path)
    monkeypatch.setattr("mecdeploy.training.data.image_folder.MEMORY_LIMIT", 18 * 3 * 10 * 10 - 1)
    streamed = load(tmp_path)
    assert isinstance(held.train, MemorySource) and isinstance(streamed.train, StreamSource)
    for one, two in ((held.train, streamed.train), (held.validation, streamed.validation)):
        assert torch.equal(one.labels, two.labels)
        for a, b in zip(one.batches(4, seed=3, epoch=2), two.batches(4, seed=3, epoch=2), strict=True):
            assert torch.equal(a.labels, b.labels) and torch.equal(a.images[0], b.images[0])


def test_images_of_many_sizes_become_224(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 2}, size=(30, 50))
    put(tmp_path / "b" / "large.png", (40, 65))
    data = load(tmp_path)
    assert (data.height, data.width) == (224, 224) and isinstance(data.train, StreamSource)


@pytest.mark.parametrize("odd_one", ["train/a/000.png", "train/b/001.png", "val/b/zz.png"])
def test_grayscale_only_if_every_image_is(tmp_path: Path, odd_one: str) -> None:
    fill(tmp_path / "train", {"a": 3, "b": 3}, mode="L")
    fill(tmp_path / "val", {"a": 3, "b": 3}, mode="L")
    assert load(tmp_path).channels == 1
    put(tmp_path / odd_one, mode="RGB")
    data = load(tmp_path)
    assert data.channels == 3 and data.train.arrays()[0].shape == (6, 3, 10, 10)


def test_only_as_many_headers_are_read_as_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = scan_folder(fill(tmp_path, {"a": 5, "b": 5}), validation_fraction=0.1)
    headers = {path: (100, 100 + index, index < 3) for index, path in enumerate(folder.train.paths)}
    asked: list[str] = []

    def probe(path: str) -> tuple[int, int, bool]:
        asked.append(path)
        return headers[path]

    monkeypatch.setattr("mecdeploy.training.data.image_folder.probe_image", probe)
    shape = survey(folder, image_size=0, skip_unreadable=False)
    assert shape == Shape(channels=3, height=224, width=224)
    assert asked == list(folder.train.paths[:4])  # the fourth is the first in colour


def test_colour_folders_are_mirrored_and_others_are_not(tmp_path: Path) -> None:
    def is_mirrored(data: ImageDataset) -> bool:
        """Whether some augmented image falls from left to right; all originals rise."""
        found = False
        for epoch in range(4):
            for batch in data.train.batches(8, seed=0, epoch=epoch, augment=True):
                inner = batch.images[0][:, :, 2:-2, 2:-2].int()  # without the padding
                found |= bool((inner.diff(dim=3) < 0).all(dim=(1, 2, 3)).any())
        return found

    for size in (16, 80):  # in memory, streamed
        ramp = np.repeat(np.arange(size, dtype=np.uint8)[None] * 3, size, axis=0)
        for mode, root in (("RGB", tmp_path / f"rgb{size}"), ("L", tmp_path / f"l{size}")):
            for name in ("a/1", "a/2", "a/3", "b/1", "b/2", "b/3"):
                path = root / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(ramp).convert(mode).save(path)
        assert is_mirrored(load(tmp_path / f"rgb{size}"))
        assert not is_mirrored(load(tmp_path / f"rgb{size}", flip=False))
        assert not is_mirrored(load(tmp_path / f"l{size}"))


def test_statistics_are_those_of_the_training_images(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 3, "b": 3})
    fill(tmp_path / "val", {"a": 1, "b": 1})
    data = load(tmp_path)
    pixels = data.train.arrays()[0].astype(np.float64)
    assert (data.pixel_mean, data.pixel_std) == pytest.approx((pixels.mean(), pixels.std()), rel=1e-12)


def test_statistics_of_a_stream_are_those_of_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"a": 6, "b": 6}, size=(70, 70))
    data = load(tmp_path)
    pixels = data.train.arrays()[0].astype(np.float64)
    assert (data.pixel_mean, data.pixel_std) == pytest.approx((pixels.mean(), pixels.std()), rel=1e-12)
    monkeypatch.setattr("mecdeploy.training.data.image_folder.STATISTICS_SAMPLE", 2)
    means = {load(tmp_path, seed=seed).pixel_mean for seed in (0, 0, 0, 1, 2, 3)}
    assert 1 < len(means) <= 4
