"""Folders of random images, written and loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mecdeploy.training.config import DataConfig
from mecdeploy.training.data import ImageDataset, load_dataset


def put(path: Path, size: tuple[int, int] = (10, 10), mode: str = "RGB", seed: int = 0) -> Path:
    """Write a random image; size is (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if mode == "L" else (*size, 3)
    # The path seeds the pixels too, so that no two images are alike.
    rng = np.random.default_rng([seed, *path.as_posix().encode()])
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def fill(root: Path, counts: dict[str, int], **options: object) -> Path:
    for name, count in counts.items():
        for index in range(count):
            put(root / name / f"{index:03}.png", **options)  # type: ignore[arg-type]
    return root


def load(root: Path, *, seed: int = 0, **options: object) -> ImageDataset:
    return load_dataset(DataConfig(name=f"imagefolder:{root}", workers=0, **options), seed=seed)  # type: ignore[arg-type]
