"""docs/own-models.md and docs/adding-an-operator.md show code that runs, and code as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```python\n(.*?)```", re.S)


def test_the_walk_through_shows_the_code_itself() -> None:
    text = (ROOT / "docs/adding-an-operator.md").read_text()
    files = [ROOT / name for name in dict.fromkeys(re.findall(r"\]\(\.\./(\w+/[\w/]+\.py)\)", text))]
    assert len(files) == 6  # three rooms: what trains takes three, what is written one, what checks two
    source = "\n".join(path.read_text() for path in files)
    blocks = BLOCK.findall(text)
    assert len(blocks) == 7
    for piece in (piece for block in blocks for piece in block.rstrip().split("\n\n\n")):
        assert piece in source


def test_the_loop_of_your_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there, but for smaller images, no download, and fewer epochs."""
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/own-models.md").read_text()
    loop, islands, *_ = BLOCK.findall(text)
    for old, new in (
        ("pretrained=True", "pretrained=False"),
        ("height=64, width=64", "height=32, width=32"),
        ("range(10)", "range(2)"),
        ("epoch == 8", "epoch == 1"),
    ):
        assert old in loop
        loop = loop.replace(old, new)
    images, labels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8)
    names: dict[str, Any] = {
        "images": images,
        "batches": [(images, labels)],
        "names": [str(label) for label in range(10)],
        "np_images": images.numpy(),
        "np_labels": labels.numpy(),
    }
    exec(loop, names)
    assert names["report"].integers_different == 0
    exec(islands, names)
