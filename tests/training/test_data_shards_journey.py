"""From a folder of images by the documented script to shards, and from these to a checked model."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import image_folders
import numpy as np
import pytest
import shard_sets

import mecdeploy
from mecdeploy.training.data.source import ImageSource

ROOT = Path(__file__).parents[2]
# Python 3.12 and later warn about any fork of a process that has threads, which torch's have by then.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def make_shards(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the script of docs/data.md."""
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    monkeypatch.setattr(sys, "argv", ["make_shards.py", str(folder), str(out)])
    exec(compile(script, "docs/data.md", "exec"), {"__name__": "__main__"})


def sorted_images(source: ImageSource) -> list[tuple[int, bytes]]:
    return sorted((int(label), image.tobytes()) for image, label in zip(*source.arrays(), strict=True))


def test_shards_of_a_folder_train_a_model_that_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, shards = tmp_path / "folder", tmp_path / "shards"
    image_folders.fill(folder / "train", {"ant": 30, "bee": 20})
    image_folders.fill(folder / "val", {"ant": 6, "bee": 6})
    (folder / "train" / "ant" / "000.png").rename(folder / "train" / "ant" / "a.dotted.name.png")
    make_shards(folder, shards, monkeypatch)

    ours, theirs = shard_sets.load(shards, image_size=16), image_folders.load(folder, image_size=16)
    assert ours.class_names == theirs.class_names == ("ant", "bee")
    assert sorted_images(ours.train) == sorted_images(theirs.train)
    assert sorted_images(ours.validation) == sorted_images(theirs.validation)
    assert len(np.unique(ours.train.arrays(20)[1])) == 2  # mixed

    config = mecdeploy.TrainConfig(
        method="lsq",
        device="cpu",
        data=mecdeploy.DataConfig(name=f"shards:{shards}", image_size=16, workers=1),
        schedule=mecdeploy.ScheduleConfig(fp_epochs=0, epochs=1, frozen_epochs=0, batch_size=16),
    )
    run = tmp_path / "run"
    assert 0 <= mecdeploy.train(config, run).accuracy <= 1
    mecdeploy.export(run)
    assert mecdeploy.check(run).passed
