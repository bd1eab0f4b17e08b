"""Image folders without labels, and labelled sets whose labels are not looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_folders import fill, put

from mecdeploy.training.config import DataConfig
from mecdeploy.training.data import ImageDataset, load_dataset
from mecdeploy.training.data.unlabelled import KnownClasses
from mecdeploy.training.errors import TrainingError

NAMED = KnownClasses(names=("zebra", "ant", "cat"), named=True)
NUMBERED = KnownClasses(names=("0", "1", "2"), named=False)


def load(root: Path, classes: KnownClasses = NAMED, **options: Any) -> ImageDataset:
    config = DataConfig(name=f"imagefolder:{root}", labels="none", workers=0, **options)
    return load_dataset(config, seed=0, classes=lambda shape: classes)


def loose(root: Path, count: int) -> Path:
    for index in range(count):
        put(root / f"{index:03}.png")
    return root


def refusal(root: Path, classes: KnownClasses = NAMED, **options: Any) -> str:
    with pytest.raises(TrainingError) as caught:
        load(root, classes, **options)
    return str(caught.value)


@pytest.mark.parametrize("inside", ["", "train"])
def test_every_image_at_any_depth_trains_or_validates(tmp_path: Path, inside: str) -> None:
    loose(tmp_path / inside, 5)
    fill(tmp_path / inside / "some", {"folder": 5})
    data = load(tmp_path, validation_fraction=0.2)
    assert (len(data.train), len(data.validation)) == (8, 2)
    assert not data.validation_labelled and data.test is None
    assert data.class_names == NAMED.names
    assert set(data.train.labels.tolist()) == set(data.validation.labels.tolist()) == {-1}
    images = {image.tobytes() for part in (data.train, data.validation) for image in part.arrays()[0]}
    assert len(images) == 10


def test_class_folders_validate_by_the_teachers_indices(tmp_path: Path) -> None:
    loose(tmp_path / "train", 6)
    fill(tmp_path / "val", {"ant": 2, "zebra": 1})
    data = load(tmp_path)
    assert data.validation_labelled and data.class_names == NAMED.names
    assert sorted(data.validation.labels.tolist()) == [0, 1, 1]
    zebra = load(tmp_path, KnownClasses(names=("a", "ant", "zebra"), named=True)).validation
    assert sorted(zebra.labels.tolist()) == [1, 1, 2]
    assert np.array_equal(zebra.arrays()[0], data.validation.arrays()[0])


def test_as_many_class_folders_as_numbers_name_them(tmp_path: Path) -> None:
    loose(tmp_path / "train", 6)
    fill(tmp_path / "val", {"b": 1, "a": 1, "c": 2})
    data = load(tmp_path, NUMBERED)
    assert data.class_names == ("a", "b", "c")
    assert sorted(data.validation.labels.tolist()) == [0, 1, 2, 2]


def test_loose_images_validate_by_the_teacher(tmp_path: Path) -> None:
    loose(tmp_path / "train", 6)
    loose(tmp_path / "val", 3)
    data = load(tmp_path, NUMBERED)
    assert (len(data.train), len(data.validation)) == (6, 3)
    assert not data.validation_labelled and data.class_names == ("0", "1", "2")


def test_carved_validation_has_no_labels_and_the_given_part_keeps_its_own(tmp_path: Path) -> None:
    loose(tmp_path / "train", 10)
    fill(tmp_path / "val", {"ant": 2, "zebra": 1})
    data = load(tmp_path, validation="carved", validation_fraction=0.3, fraction=0.5)
    assert (len(data.train), len(data.validation)) == (4, 3)  # 3.5 of 7, halves up
    assert not data.validation_labelled
    assert data.test is not None and sorted(data.test.labels.tolist()) == [0, 1, 1]


def test_digits_keep_their_labels_to_validate_by_and_are_chosen_without(tmp_path: Path) -> None:
    config = DataConfig(labels="none", validation="carved", fraction=0.01)
    data = load_dataset(config, seed=0)
    assert data.validation_labelled and len(data.validation) == 144
    # 13 of 1293 images, drawn from all of them: class by class it would be 1 of each, and 3 more from none.
    assert len(data.train) == 13
    labelled = load_dataset(DataConfig(validation="carved", fraction=0.01), seed=0)
    assert len(labelled.train) == 10
    counts = np.bincount(data.validation.labels.numpy(), minlength=10)
    by_class = np.bincount(labelled.validation.labels.numpy(), minlength=10)
    assert counts.sum() == by_class.sum() and counts.tolist() != by_class.tolist()


def test_what_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none").startswith(f"'{tmp_path / 'none'}' does not exist; data.name imagefolder:PATH")
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").startswith(f"'{tmp_path / 'empty'}' holds no images (.bmp, ")
    assert refusal(loose(tmp_path / "one", 1)) == (
        f"'{tmp_path / 'one'}' holds one image, which leaves none to validate with; add images."
    )
    loose(tmp_path / "no train" / "val", 3)
    assert "holds val/ but no train/; expected PATH/train/** or" in refusal(tmp_path / "no train")
    assert refusal(loose(tmp_path / "few", 9), fraction=0.01) == (
        "data.fraction is 0.01, which leaves the data set none of its 8 training images; make it at least 0.0625."
    )


def test_class_folders_that_the_weights_do_not_know(tmp_path: Path) -> None:
    loose(tmp_path / "train", 6)
    fill(tmp_path / "val", {"ant": 1, "dog": 1})
    assert refusal(tmp_path) == (
        f"'{tmp_path}' has the class folder 'dog' to validate with, but the weights know no such class (zebra, ant, "
        "cat); rename it, or put the images into it without class folders, to validate by the teacher."
    )
    assert refusal(tmp_path, NUMBERED) == (
        f"'{tmp_path}' has 2 class folders to validate with, the weights have 3 classes without names; make them as "
        "many, or put the images into it without class folders, to validate by the teacher."
    )


def test_unreadable_images_are_left_out(tmp_path: Path) -> None:
    loose(tmp_path, 10)
    for index in range(3):
        (tmp_path / f"{index:03}.png").write_bytes(b"no image")
    data = load(tmp_path, skip_bad_images=True)
    assert len(data.skipped) == 3 and len(data.train) + len(data.validation) == 7


def test_a_folder_with_no_readable_image_to_train_on(tmp_path: Path) -> None:
    loose(tmp_path / "val", 3)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.png").write_bytes(b"no image")
    assert refusal(tmp_path, skip_bad_images=True) == (
        f"no training image can be read, '{tmp_path / 'train' / 'a.png'}' first of all."
    )


def test_without_classes_there_is_no_data_set(tmp_path: Path) -> None:
    loose(tmp_path, 4)
    with pytest.raises(TrainingError, match=r"nothing names the classes of .*; give classes=\."):
        load_dataset(DataConfig(name=f"imagefolder:{tmp_path}", labels="none"), seed=0)
