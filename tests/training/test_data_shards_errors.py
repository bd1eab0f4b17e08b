"""Tar shards that cannot be used: each problem in one line that names shard and key."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from shard_sets import fill, load, picture, sample, write, write_members

from mecdeploy.training.config import DataConfig
from mecdeploy.training.data import load_dataset
from mecdeploy.training.errors import TrainingError

# Python 3.12 and later warn about any fork of a process that has threads, which torch's have by then.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def refusal(root: Path, **options: object) -> str:
    with pytest.raises(TrainingError) as caught:
        load(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Layout


def test_no_folder(tmp_path: Path) -> None:
    layout = "PATH/train/*.tar with PATH/val/*.tar"
    root = tmp_path / "none"
    assert refusal(root) == f"'{root}' does not exist; data.name shards:PATH needs a folder: {layout}."
    root.write_bytes(b"")
    assert refusal(root) == f"'{root}' is a file; data.name shards:PATH needs a folder: {layout}."
    write(tmp_path, [sample(0)])
    assert refusal(tmp_path) == f"'{tmp_path}' holds no train/; expected {layout}."


def test_no_path() -> None:
    with pytest.raises(TrainingError, match=r"^data\.name is 'shards:' without a path; write shards:PATH\.$"):
        load_dataset(DataConfig(name="shards:"), seed=0)


def test_a_folder_of_shards_where_a_name_belongs(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(TrainingError, match=f"It is a folder: write shards:{tmp_path}\\. Choose one of"):
        load_dataset(DataConfig(name=str(tmp_path)), seed=0)


def test_no_validation_part(tmp_path: Path) -> None:
    write(tmp_path / "train", [sample(0)])
    assert refusal(tmp_path) == (
        f"'{tmp_path}' holds no val/ (or validation, test/). Nothing is held out here, since shards may be sorted by "
        "class: move some, with images of every class, from train/ to val/."
    )


def test_no_shards(tmp_path: Path) -> None:
    fill(tmp_path)
    for shard in (tmp_path / "val").glob("*.tar"):
        shard.rename(shard.with_suffix(".tar.gz"))
    assert refusal(tmp_path) == f"'{tmp_path / 'val'}' holds no shards (*.tar, not compressed)."


def test_empty_shards(tmp_path: Path) -> None:
    fill(tmp_path)
    for shard in (tmp_path / "val").glob("*.tar"):
        write_members(shard, {})
    assert refusal(tmp_path) == f"'{tmp_path / 'val'}' holds no images: its shards are empty."


# Shards


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7, 0.95])
def test_a_truncated_shard(tmp_path: Path, keep: float, workers: int) -> None:
    shard = fill(tmp_path) / "train" / "002.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[: int(keep * len(data.rstrip(b"\0")))])
    text = refusal(tmp_path, workers=workers)
    assert text.startswith(f"'{shard}' is ")
    assert "truncated" in text or "is no whole, uncompressed tar file (unexpected end of data)" in text
    assert text.endswith(" again.")


def test_a_shard_cut_between_members(tmp_path: Path) -> None:
    shard = fill(tmp_path) / "train" / "002.tar"
    data = shard.read_bytes()
    end = data.rindex(b"0020.cls") // 512 * 512  # the header of the last sample's label
    shard.write_bytes(data[:end])
    assert refusal(tmp_path).startswith(f"'{shard}' is truncated or damaged: what follows byte {end} is not the end")


def test_a_damaged_header(tmp_path: Path) -> None:
    shard = fill(tmp_path) / "train" / "002.tar"
    data = bytearray(shard.read_bytes())
    at = data.index(b"0017.cls") // 512 * 512
    data[at + 150] ^= 1  # in its checksum
    shard.write_bytes(data)
    assert refusal(tmp_path) == (
        f"'{shard}' is truncated or damaged: what follows byte {at} is not the end of a tar file. Copy or write it "
        "again."
    )


def test_no_tar_at_all(tmp_path: Path) -> None:
    shard = fill(tmp_path) / "train" / "002.tar"
    shard.write_bytes(b"nothing" * 200)
    text = refusal(tmp_path)
    assert text.startswith(f"'{shard}' is no whole, uncompressed tar file (") and text.endswith(
        "copy or write it again."
    )


# Samples

PNG = picture(0)


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"a.png": PNG}, "'{}/a' has no label: there is no a.cls next to it; its members: png."),
        ({"a.cls": b"0", "a.tif": PNG}, "'{}/a' has no image (jpg, jpeg, png, webp); its members: cls, tif."),
        ({"a.cls": b"0", "a.png": PNG, "a.jpg": PNG}, "'{}/a' has 2 images; its members: cls, jpg, png."),
        ({"a.png": PNG, "a.cls": b"cat"}, "'{}/a.cls' says 'cat'; a label is a class index, counted from 0, as text "),
        ({"a.png": PNG, "a.cls": b""}, "'{}/a.cls' says ''; a label is a class index"),
        ({"a.png": PNG, "a.cls": b"-1"}, "'{}/a.cls' says '-1'; a label is"),
        ({"a.png": PNG, "a.cls": b"1.5"}, "'{}/a.cls' says '1.5'; a label is"),
        ({"a.png": PNG, "a.cls": b"1048576"}, "'{}/a.cls' says '1048576'; a label is"),
        ({"a.png": PNG, "a.PNG": PNG, "a.cls": b"0"}, "'{}/a.PNG' occurs twice; write the shard again."),
        (
            {"a.png": PNG, "a.cls": b"0", "b.png": PNG, "b.cls": b"1", "a.jpg": PNG},
            "'{}' holds 'a' twice; the members of a sample must follow each other, and no other sample",
        ),
        ({"a.png": PNG, "b.png": PNG, "a.cls": b"0", "b.cls": b"1"}, "'{}/a' has no label"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_is_none(tmp_path: Path, members: dict[str, bytes], text: str, workers: int) -> None:
    shard = write_members(fill(tmp_path) / "train" / "bad.tar", members)
    assert refusal(tmp_path, workers=workers).startswith(text.format(shard))
    assert not (tmp_path / "train" / ".mecdeploy-index.safetensors").exists()


# Labels


def test_a_label_without_a_class(tmp_path: Path) -> None:
    fill(tmp_path)
    classes = tmp_path / "classes.txt"
    classes.write_text("ant\nbee\n")
    assert refusal(tmp_path) == (
        f"'{tmp_path}/train/000.tar/0002.png' has label 2, but '{classes}' names 2 classes, 0 to 1."
    )


def test_a_class_without_training_images(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\ndog\nemu\n")
    assert refusal(tmp_path) == (
        f"class 3 ('dog') has no image in '{tmp_path / 'train'}' (2 of 5 classes have none); labels are counted from 0."
    )


def test_labels_counted_from_one(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write(tmp_path / part, [{**sample(index), "cls": 1 + index % 3} for index in range(9)])
    assert "class 0 ('0') has no image in" in refusal(tmp_path)


def test_a_label_that_only_validation_has(tmp_path: Path) -> None:
    fill(tmp_path)
    write_members(tmp_path / "val" / "more.tar", {"a.png": PNG, "a.cls": b"3"})
    assert "class 3 ('3') has no image in" in refusal(tmp_path)


def test_one_class(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write(tmp_path / part, [{**sample(index), "cls": 0} for index in range(9)])
    assert refusal(tmp_path) == f"'{tmp_path}' holds only the class '0'; a classifier needs at least two."


def test_a_class_named_twice(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "classes.txt").write_text("ant\nbee\nant\n")
    assert refusal(tmp_path) == f"'{tmp_path / 'classes.txt'}' holds 'ant' twice, in lines 1 and 3."


def test_classes_that_cannot_be_read(tmp_path: Path) -> None:
    classes = fill(tmp_path) / "classes.txt"
    classes.write_text("ant\n\nbee\ncat\n")  # leaving the line out would give bee the label of cat
    assert refusal(tmp_path) == f"'{classes}': line 2 is empty; each line names a class."
    classes.write_bytes(b"\xff\xfe")
    assert refusal(tmp_path).startswith(f"'{classes}' cannot be read as UTF-8 text: ")


# While training


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(tmp_path: Path, workers: int) -> None:
    fill(tmp_path)
    write(tmp_path / "val", [sample(0), {**sample(1), "png": PNG[:300]}, sample(2)])
    with pytest.raises(TrainingError) as caught:
        list(load(tmp_path, workers=workers).validation.batches(2))
    assert str(caught.value) == (
        f"'{tmp_path}/val/000.tar/0001.png' is no readable image (image file is truncated). Replace or remove it, or "
        "leave such files out with --skip-bad-images (data.skip_bad_images = true)."
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_left_out_on_request_and_named(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "train", [{**sample(i), **({"png": b"no"} if i in (3, 15) else {})} for i in range(20)])
    write(tmp_path / "val", [{**sample(i), **({"png": PNG[:300]} if i == 0 else {})} for i in range(8)])
    bad = ("train/000.tar/0003.png", "train/002.tar/0015.png", "val/000.tar/0000.png")
    for _ in range(2):  # found when indexing, and the second time in the index
        data = load(tmp_path, workers=workers, skip_bad_images=True)
        assert data.skipped == tuple(f"{tmp_path}/{name}" for name in bad)
        assert data.train.labels.tolist() == [i % 3 for i in range(20) if i not in (3, 15)]
        assert sum(len(batch.labels) for batch in data.train.batches(4, seed=0, augment=True)) == 18
        monkeypatch.setattr("mecdeploy.training.data.shards_index.read_shard", pytest.fail)
    monkeypatch.undo()
    (tmp_path / "train" / "000.tar").unlink()  # the others keep what was found in them
    assert load(tmp_path, skip_bad_images=True).skipped == tuple(f"{tmp_path}/{name}" for name in bad[1:])
    for shard in (tmp_path / "val").glob("*.tar"):
        shard.unlink()
    write(tmp_path / "val", [{**sample(0), "png": b"no"}])
    assert refusal(tmp_path, skip_bad_images=True) == (
        f"'{tmp_path / 'val'}' holds no images: none of its 1 images can be read."
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_changes_after_it_was_indexed(tmp_path: Path, workers: int) -> None:
    source = load(fill(tmp_path), workers=workers).validation
    shard = tmp_path / "val" / "001.tar"
    os.utime(shard, ns=(0, 0))
    with pytest.raises(TrainingError) as caught:
        list(source.batches(4))
    assert str(caught.value) == (
        f"'{shard}' has changed since it was indexed; leave shards alone during a run, and start again: then it is "
        "indexed anew."
    )
    shard.unlink()
    with pytest.raises(TrainingError, match=rf"^'{shard}' cannot be read: No such file or directory\.$"):
        list(source.batches(4))


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    source = load(fill(tmp_path)).validation
    reader = source.batches(1)
    next(reader)
    os.truncate(tmp_path / "val" / "000.tar", 700)
    with pytest.raises(
        TrainingError, match=r"^'.*/val/000\.tar/byte \d+' ends after 0 of \d+ bytes; has its shard changed"
    ):
        next(reader)


def test_without_the_package_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert refusal(tmp_path) == (
        "tar shards are indexed with the webdataset package, which is not installed: pip install 'mecdeploy[shards]'."
    )
    monkeypatch.undo()
    load(tmp_path)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    load(tmp_path)  # indexed already


def test_no_place_for_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "train" / ".mecdeploy-index.safetensors").mkdir()
    (tmp_path / "train" / ".mecdeploy-index.safetensors" / "full").mkdir()
    text = refusal(tmp_path)
    assert text.startswith(f"the index of '{tmp_path / 'train'}' cannot be written to '{tmp_path / 'file'}/mecdeploy/")
    assert not list((tmp_path / "train").glob("*.safetensors.*"))
