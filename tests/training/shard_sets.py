"""Small sets of tar shards, written by WebDataset's own writer."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from mecdeploy.training.config import DataConfig
from mecdeploy.training.data import ImageDataset, load_dataset

CLASSES = 3


def picture(index: int, *, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """A random image file, each of another size."""
    shape = (25 + index % 9, 40 - index % 7, 3)
    pixels = np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def sample(index: int, **options: str) -> dict[str, Any]:
    return {"__key__": f"{index:04}", "png": picture(index, **options), "cls": index % CLASSES}


def write(folder: Path, samples: list[dict[str, Any]], *, in_a_shard: int = 7) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "%03d.tar"), maxcount=in_a_shard, verbose=0, mtime=0) as writer:
        for one in samples:
            writer.write(one)
    return folder


def fill(root: Path, *, train: int = 40, validation: int = 12, **options: str) -> Path:
    """Images 0.. to train on, and 1000.. to validate, of 3 classes."""
    write(root / "train", [sample(index, **options) for index in range(train)])
    write(root / "val", [sample(1000 + index, **options) for index in range(validation)])
    return root


def load(root: Path, *, seed: int = 0, **options: Any) -> ImageDataset:
    given = {"image_size": 20, "workers": 0, **options}
    return load_dataset(DataConfig(name=f"shards:{root}", **given), seed=seed)


def write_members(shard: Path, members: dict[str, bytes]) -> Path:
    """A shard of these members, without a writer that would see to it that they make samples."""
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return shard
