"""Image folders: every way in which one can be wrong, and the words that say so."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from image_folders import fill, load, put
from PIL import Image

from mecdeploy.training.config import DataConfig
from mecdeploy.training.data import load_dataset
from mecdeploy.training.errors import TrainingError

LAYOUT = "PATH/train/<class>/* with PATH/val/<class>/*, or PATH/<class>/*"


def refusal(root: Path, **options: object) -> str:
    with pytest.raises(TrainingError) as caught:
        load(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_small_images_of_many_sizes_need_an_image_size(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 3, "b": 3}, size=(30, 50))
    put(tmp_path / "b" / "x.png", (28, 64))
    text = refusal(tmp_path)
    assert "is 50x30, " in text and "x.png' is 64x28. Set data.image_size to " in text
    assert text.startswith("images differ in size: '") and text.endswith(
        " the side they shall be resized to, such as 64."
    )
    assert load(tmp_path, image_size=28).height == 28


def test_missing(tmp_path: Path) -> None:
    root = tmp_path / "nowhere"
    assert refusal(root) == f"'{root}' does not exist; data.name imagefolder:PATH needs a folder: {LAYOUT}."


def test_a_file(tmp_path: Path) -> None:
    root = put(tmp_path / "x.png")
    assert refusal(root) == f"'{root}' is a file; data.name imagefolder:PATH needs a folder: {LAYOUT}."


@pytest.mark.parametrize("inside", ["", "train"])
def test_empty(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    assert refusal(tmp_path) == f"'{folder}' is empty: it holds no class folders; expected {LAYOUT}."
    put(folder / "x.jpg")
    assert refusal(tmp_path) == f"'{folder}' holds images but no class folders; expected {LAYOUT}."


def test_no_train(tmp_path: Path) -> None:
    fill(tmp_path / "val", {"a": 1, "b": 1})
    assert refusal(tmp_path) == f"'{tmp_path}' holds val/ but no train/; expected {LAYOUT}."


def test_one_class(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 3})
    assert refusal(tmp_path) == f"'{tmp_path}' holds only the class 'cat'; a classifier needs at least two."


def test_a_class_without_images(tmp_path: Path) -> None:
    fill(tmp_path, {"cat": 3, "dog": 3})
    (tmp_path / "eel").mkdir()
    (tmp_path / "eel" / "notes.txt").write_text("none yet")
    assert refusal(tmp_path) == (
        f"'{tmp_path / 'eel'}' holds no images (.bmp, .gif, .jpeg, .jpg, .pbm, .pgm, .png, .ppm, .tif, .tiff, .webp); "
        "add some or remove it."
    )


def test_different_classes_in_the_two_parts(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"cat": 1, "dog": 1, "eel": 1})
    fill(tmp_path / "val", {"cat": 1, "dgo": 1})
    assert refusal(tmp_path) == (
        f"'{tmp_path / 'val'}' has no class 'dog' (2 of 3 missing); train/ and val/ need the same class folders."
    )
    fill(tmp_path / "val", {"dog": 1, "eel": 1})
    assert refusal(tmp_path) == (
        f"'{tmp_path / 'train'}' has no class 'dgo' (1 of 4 missing); train/ and val/ need the same class folders."
    )


def test_one_image_a_class(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 1, "b": 1})
    assert refusal(tmp_path) == (
        f"'{tmp_path}' has one image a class, which leaves none to validate with; add images or a val/ folder."
    )


def test_all_pixels_equal(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (5, 5), 9).save(tmp_path / name)
    assert refusal(tmp_path) == "every pixel of the training images is 9; check the images."


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"a": 2, "b": 2})
    scan = os.scandir

    def guarded(path: str | Path) -> object:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))  # a mode that root, too, respects
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert refusal(tmp_path) == f"'{tmp_path / 'b'}' cannot be read: Permission denied."


@pytest.mark.parametrize("size", [10, 80])
@pytest.mark.parametrize("part", ["train", "val"])
def test_an_unreadable_image(tmp_path: Path, size: int, part: str) -> None:
    for folder in ("train", "val"):
        fill(tmp_path / folder, {"a": 3, "b": 3}, size=(size, size))
    bad = tmp_path / part / "b" / "001.png"
    bad.write_bytes(b"words")
    assert refusal(tmp_path) == (
        f"'{bad}' is no readable image (of no known image format). Replace or remove it, or leave such files out with "
        "--skip-bad-images (data.skip_bad_images = true)."
    )


@pytest.mark.parametrize("size", [10, 80])
def test_unreadable_images_can_be_skipped_and_are_listed(tmp_path: Path, size: int) -> None:
    for folder in ("train", "val"):
        fill(tmp_path / folder, {"a": 3, "b": 3}, size=(size, size))
    before = [image.tobytes() for image in load(tmp_path).train.arrays()[0]]
    bad = [tmp_path / name for name in ("train/a/000.png", "train/b/002.png", "val/a/001.png")]
    bad[0].write_bytes(b"words")
    for path in bad[1:]:  # a healthy header, found out only by reading on
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data = load(tmp_path, skip_bad_images=True)
    assert sorted(data.skipped) == sorted(map(str, bad))
    assert data.train.labels.tolist() == [1, 0, 1, 0] and data.validation.labels.tolist() == [0, 1, 1, 0, 1]
    kept = [image.tobytes() for image in data.train.arrays()[0]]
    assert kept == [before[1], before[2], before[3], before[4]]
    assert sum(len(batch.labels) for batch in data.train.batches(2, seed=0, augment=True)) == 4


def test_skipping_does_not_move_the_others_between_the_parts(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 20, "b": 20})
    before = {image.tobytes() for image in load(tmp_path).validation.arrays()[0]}
    (tmp_path / "a" / "004.png").write_bytes(b"")
    after = {image.tobytes() for image in load(tmp_path, skip_bad_images=True).validation.arrays()[0]}
    assert after <= before and len(before - after) <= 1


def test_skipping_everything(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 2, "b": 2})
    fill(tmp_path / "val", {"a": 1, "b": 1})
    for path in (tmp_path / "val").rglob("*.png"):
        path.write_bytes(b"")
    first = tmp_path / "val" / "a" / "000.png"
    assert refusal(tmp_path, skip_bad_images=True) == f"no validation image can be read, '{first}' first of all."
    for path in (tmp_path / "train" / "b").rglob("*.png"):
        path.write_bytes(b"")
    text = "class 'b' has no readable training image left; 4 files cannot be read."
    assert refusal(tmp_path, skip_bad_images=True) == text
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    first = tmp_path / "train" / "a" / "000.png"
    assert refusal(tmp_path, skip_bad_images=True) == f"none of the 6 image files can be read, '{first}' first of all."


def test_no_path() -> None:
    with pytest.raises(TrainingError, match=r"^data\.name is 'imagefolder:' without a path; write imagefolder:PATH\.$"):
        load_dataset(DataConfig(name="imagefolder:"), seed=0)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar", " Did you mean cifar10?"),
        ("CIFAR100", " Did you mean cifar100?"),
        ("fashion_mnist", " Did you mean fashion-mnist?"),
        ("imagefolder", " Did you mean imagefolder:PATH?"),
        ("shard", " Did you mean shards:PATH?"),
        ("digit", " Did you mean digits?"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_an_unknown_name(name: str, hint: str) -> None:
    with pytest.raises(TrainingError) as caught:
        load_dataset(DataConfig(name=name), seed=0)
    assert str(caught.value) == (
        f"data.name is {name!r}, which is no known data set.{hint} Choose one of digits, cifar10, cifar100, "
        "fashion-mnist, imagefolder:PATH, shards:PATH."
    )


def test_a_folder_where_a_name_belongs(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=f"It is a folder: write imagefolder:{tmp_path}\\. Choose one of"):
        load_dataset(DataConfig(name=str(tmp_path)), seed=0)


def test_a_dataset_is_a_value(tmp_path: Path) -> None:
    data = load(fill(tmp_path, {"a": 3, "b": 3}))
    assert replace(data, width=3).width == 3 and data.width == 10
