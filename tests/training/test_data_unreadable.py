"""Files that are no images: named, explained, found before they hurt."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mecdeploy.training.data import decode_image
from mecdeploy.training.data.decode import UnreadableImage, decode_many, find_unreadable, open_image
from mecdeploy.training.errors import TrainingError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (6, 5), dtype=np.uint8)
WAY_OUT = "Replace or remove it, or leave such files out with --skip-bad-images (data.skip_bad_images = true)."


def save(path: Path, image: Image.Image) -> Path:
    image.save(path)
    return path


def broken(folder: Path) -> dict[str, Path]:
    picture = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(picture, "JPEG")
    drawing = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(drawing, "PNG")
    damaged = bytearray(drawing.getvalue())
    damaged[len(damaged) // 2] ^= 0xFF
    contents = {
        "empty.jpg": b"",
        "text.png": b"these are words, not pixels",
        "truncated.jpg": picture.getvalue()[:700],
        "truncated.png": drawing.getvalue()[:700],
        "headless.jpg": picture.getvalue()[100:],
        "damaged.png": bytes(damaged),
    }
    paths = {}
    for name, content in contents.items():
        paths[name] = folder / name
        paths[name].write_bytes(content)
    paths["float.tif"] = save(folder / "float.tif", Image.fromarray(GRAY.astype(np.float32)))
    paths["missing.jpg"] = folder / "missing.jpg"
    (folder / "folder.jpg").mkdir()
    paths["folder.jpg"] = folder / "folder.jpg"
    return paths


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.jpg", "of no known image format"),
        ("text.png", "of no known image format"),
        ("truncated.jpg", "image file is truncated"),
        ("truncated.png", "image file is truncated"),
        ("headless.jpg", "of no known image format"),
        ("damaged.png", "broken"),
        ("float.tif", "32-bit float pixels have no 8-bit meaning"),
        ("missing.jpg", "No such file or directory"),
        ("folder.jpg", "Is a directory"),
    ],
)
def test_a_file_that_is_no_image_is_named_with_the_reason_and_the_way_out(
    tmp_path: Path, name: str, reason: str
) -> None:
    path = broken(tmp_path)[name]
    with pytest.raises(TrainingError) as refusal:
        decode_image(path, channels=3, height=8, width=8)
    text = str(refusal.value)
    assert text.startswith(f"'{path}' is no readable image ({reason}")
    assert text.endswith(f"). {WAY_OUT}")
    assert "\n" not in text


def test_reading_in_bulk_finds_exactly_the_broken_ones(tmp_path: Path) -> None:
    bad = broken(tmp_path)
    good = [save(tmp_path / f"good{i}.png", Image.fromarray(COLOUR)) for i in range(600)]
    paths = [str(path) for path in (*good[:300], *bad.values(), *good[300:])]
    assert [error.path for error in find_unreadable(paths, 3)] == [str(path) for path in bad.values()]
    pixels, refused = decode_many(paths, channels=3, height=6, width=5)
    assert [error.path for error in refused] == [str(path) for path in bad.values()]
    for path, row in zip(paths, pixels, strict=True):
        assert np.array_equal(row.transpose(1, 2, 0), COLOUR if "good" in path else np.zeros_like(COLOUR))
    empty, nothing = decode_many([], channels=3, height=6, width=5)
    assert empty.shape == (0, 3, 6, 5) and nothing == []


def test_a_glance_at_an_eighth_sees_the_same_damage_as_a_full_read(tmp_path: Path) -> None:
    draw = random.Random(0)
    image = Image.fromarray(np.kron(RNG.integers(0, 256, (8, 9, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)))
    outcomes = set()
    for progressive in (False, True):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", progressive=progressive)
        for trial in range(60):
            content = bytearray(buffer.getvalue())
            if trial % 2:
                content = content[: draw.randrange(len(content))]
            else:
                content[draw.randrange(len(content))] = draw.randrange(256)
            path = tmp_path / "x.jpg"
            path.write_bytes(content)
            whole, glance = (bool(_refused(path, smallest)) for smallest in (False, True))
            assert whole == glance, f"trial {trial}, progressive {progressive}"
            outcomes.add(whole)
    assert outcomes == {True, False}


def _refused(path: Path, smallest: bool) -> str:
    try:
        open_image(path, 3, shrink=8 if smallest else 1)
    except UnreadableImage as error:
        return error.reason
    return ""


def test_running_out_of_memory_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    path = save(tmp_path / "x.png", Image.fromarray(COLOUR))
    monkeypatch.setattr(Image.Image, "load", exhausted)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", exhausted)
    with pytest.raises(MemoryError):
        decode_image(path, channels=3, height=6, width=5)


def test_an_error_survives_the_way_back_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImage("a/b.jpg", "truncated")))
    assert (error.path, error.reason) == ("a/b.jpg", "truncated")
    assert str(error) == str(UnreadableImage("a/b.jpg", "truncated"))
