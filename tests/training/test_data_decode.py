"""Decoding: every kind of image file, the resize rule written out again, and files that are none."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mecdeploy.training.data import decode_image
from mecdeploy.training.data.decode import (
    decode_augmented,
    probe_image,
)
from mecdeploy.training.data.geometry import random_resized_box

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (6, 5), dtype=np.uint8)


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def png(path: Path, width: int, height: int, colour_type: int, depth: int, rows: bytes, extra: bytes = b"") -> Path:
    """A PNG byte by byte, for what Pillow cannot be trusted to write (its own reading of it is under test)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def colour(path: Path) -> np.ndarray:
    return decode_image(path, channels=3, height=6, width=5).transpose(1, 2, 0)


def gray(path: Path) -> np.ndarray:
    return decode_image(path, channels=1, height=6, width=5)[0]


def luma(pixels: np.ndarray) -> np.ndarray:
    """ITU-R 601-2 in 16-bit fixed point, as Pillow documents its conversion to L."""
    red, green, blue = (pixels[..., k].astype(np.int64) for k in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm"])
def test_lossless_colour_is_untouched(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"x.{suffix}", Image.fromarray(COLOUR))
    pixels = decode_image(path, channels=3, height=6, width=5)
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 6, 5) and pixels.flags.c_contiguous
    assert np.array_equal(pixels.transpose(1, 2, 0), COLOUR)
    assert np.array_equal(gray(path), luma(COLOUR))


def test_grayscale_becomes_three_equal_channels(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", Image.fromarray(GRAY))
    assert np.array_equal(gray(path), GRAY)
    assert np.array_equal(colour(path), np.repeat(GRAY[..., None], 3, axis=2))


def test_transparency_is_dropped(tmp_path: Path) -> None:
    alpha = RNG.integers(0, 256, (6, 5, 1), dtype=np.uint8)
    assert np.array_equal(colour(save(tmp_path / "a.png", Image.fromarray(np.dstack([COLOUR, alpha])))), COLOUR)
    with_alpha = save(tmp_path / "b.png", Image.fromarray(np.dstack([GRAY, alpha[..., 0]])))
    assert np.array_equal(gray(with_alpha), GRAY)
    assert probe_image(str(with_alpha)) == (6, 5, True)


def palette_chunks(transparent: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return chunk(b"PLTE", COLOUR.reshape(-1, 3).tobytes()) + (chunk(b"tRNS", transparent) if transparent else b"")


@pytest.mark.parametrize("transparent", [b"", b"\x00\x80\xff", b"\xff\x00"])
def test_palettes_are_looked_up_with_or_without_transparency(tmp_path: Path, transparent: bytes) -> None:
    rows = b"".join(b"\0" + bytes(range(5 * y, 5 * y + 5)) for y in range(6))
    path = png(tmp_path / "x.png", 5, 6, 3, 8, rows, palette_chunks(transparent))
    assert np.array_equal(colour(path), COLOUR)
    assert np.array_equal(gray(path), luma(COLOUR))
    assert probe_image(str(path)) == (6, 5, False)


def test_sixteen_bit_grayscale_keeps_its_high_byte(tmp_path: Path) -> None:
    deep = RNG.integers(0, 65536, (6, 5)).astype(np.uint16)
    deep[0, :2] = 0, 65535
    path = png(tmp_path / "x.png", 5, 6, 0, 16, b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep))
    assert np.array_equal(gray(path), (deep // 256).astype(np.uint8))
    assert np.array_equal(colour(path)[..., 1], (deep // 256).astype(np.uint8))
    assert probe_image(str(path)) == (6, 5, True)
    big = save(tmp_path / "x.tif", Image.fromarray(deep.astype(np.int32)))  # 32 bits wide, mode I
    assert np.array_equal(gray(big), (deep // 256).astype(np.uint8))


def test_one_bit_images_are_black_and_white(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", Image.fromarray(GRAY > 127))
    assert np.array_equal(gray(path), np.where(GRAY > 127, 255, 0))
    assert probe_image(str(path)) == (6, 5, True)


def test_cmyk_is_ink_on_paper(tmp_path: Path) -> None:
    ink = RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8)
    path = save(tmp_path / "x.tif", Image.frombytes("CMYK", (5, 6), ink.tobytes()))
    paper = 255.0 - ink.astype(float)
    expected = paper[..., :3] * paper[..., 3:] / 255
    # Pillow multiplies in 8 bits: half a level of rounding, and as much again for its division by 255
    assert np.abs(colour(path) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_of_every_colour_space(tmp_path: Path, mode: str, progressive: bool) -> None:
    smooth = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * 8
    image = Image.merge(mode, [Image.fromarray(smooth)] * len(Image.new(mode, (1, 1)).getbands()))
    path = save(tmp_path / "x.jpg", image, quality=95, progressive=progressive)
    pixels = decode_image(path, channels=3, height=16, width=16)
    expected = smooth.astype(float) if mode != "CMYK" else (255.0 - smooth) ** 2 / 255
    assert np.abs(pixels - expected).max() < 6  # JPEG at quality 95, on a ramp
    assert probe_image(str(path)) == (16, 16, mode == "L")


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (5, 6), fill) for fill in ("red", "blue")]
    path = save(tmp_path / "x.gif", frames[0], save_all=True, append_images=frames[1:])
    assert (colour(path) == (255, 0, 0)).all()


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "x.png", Image.fromarray(COLOUR), exif=exif)
    assert np.array_equal(colour(path), COLOUR)


def resize_rule(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The rule of decode_image's docstring, once more, on float geometry."""
    scale = max(height / image.height, width / image.width)
    new_width, new_height = max(width, int(image.width * scale + 0.5)), max(height, int(image.height * scale + 0.5))
    pixels = np.asarray(image.resize((new_width, new_height), Image.Resampling.BILINEAR))
    top, left = (new_height - height) // 2, (new_width - width) // 2
    return pixels[top : top + height, left : left + width]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 7), (50, 30), (31, 31), (64, 48), (200, 11)])
@pytest.mark.parametrize("target", [(8, 8), (31, 31), (12, 20), (1, 1)])
def test_resize_to_cover_then_cut_the_centre(tmp_path: Path, height: int, width: int, target: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))
    path = save(tmp_path / "x.png", image)
    pixels = decode_image(path, channels=3, height=target[0], width=target[1])
    assert np.array_equal(pixels.transpose(1, 2, 0), resize_rule(image, *target))


def test_the_centre_is_rounded_towards_the_top_left(tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(9, dtype=np.uint8)[:, None], 4, axis=1)
    path = save(tmp_path / "x.png", Image.fromarray(ramp))
    assert decode_image(path, channels=1, height=4, width=4)[0, :, 0].tolist() == [2, 3, 4, 5]


def test_an_image_of_the_right_size_is_not_resampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "x.png", Image.fromarray(COLOUR))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("resampled")

    monkeypatch.setattr(Image.Image, "resize", refuse)
    assert np.array_equal(colour(path), COLOUR)


def test_random_crops_come_from_inside_the_image_and_flip_when_asked(tmp_path: Path) -> None:
    ramp = np.repeat(np.arange(0, 200, dtype=np.uint8)[None], 120, axis=0)  # the pixel is its column
    path = str(save(tmp_path / "x.png", Image.fromarray(ramp)))
    rising = falling = 0
    for seed in range(60):
        draw = random.Random(seed)
        (pixels,) = decode_augmented(path, channels=1, height=16, width=16, views=1, flip=True, draw=draw)
        columns = pixels[0].astype(int).mean(axis=0)
        steps = np.diff(columns)
        rising += bool((steps > 0).all())
        falling += bool((steps < 0).all())
    assert rising + falling == 60  # every crop is one piece of the ramp, mirrored or not
    assert 11 < falling < 49  # binomial(60, 1/2): 5 standard deviations


def test_flip_off_changes_nothing_but_the_mirroring(tmp_path: Path) -> None:
    path = str(save(tmp_path / "x.png", Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8))))
    mirrored = 0
    for seed in range(20):
        draws = [random.Random(seed), random.Random(seed)]
        on, off = (
            decode_augmented(path, channels=3, height=9, width=7, views=2, flip=flip, draw=draw)
            for flip, draw in zip((True, False), draws, strict=True)
        )
        for view, plain in zip(on, off, strict=True):
            same, other = np.array_equal(view, plain), np.array_equal(view, plain[:, :, ::-1])
            assert same or other
            mirrored += other
    assert 5 < mirrored < 35  # binomial(40, 1/2)


def test_views_differ_and_the_first_does_not_depend_on_the_second(tmp_path: Path) -> None:
    path = str(save(tmp_path / "x.png", Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8))))
    one = decode_augmented(path, channels=3, height=8, width=8, views=1, flip=True, draw=random.Random(4))
    two = decode_augmented(path, channels=3, height=8, width=8, views=2, flip=True, draw=random.Random(4))
    assert np.array_equal(one[0], two[0]) and not np.array_equal(two[0], two[1])


def test_a_large_jpeg_is_decoded_no_larger_than_its_crop_needs(tmp_path: Path) -> None:
    """The witness: the same box, cut from what Pillow decodes at each of a JPEG's four sizes."""
    waves = np.add.outer(np.sin(np.arange(300) / 9), np.cos(np.arange(400) / 7))
    path = str(save(tmp_path / "x.jpg", Image.fromarray((127 + 60 * waves).astype(np.uint8)).convert("RGB")))
    found = []
    for seed in range(40):
        views = decode_augmented(path, channels=3, height=50, width=60, views=2, flip=False, draw=random.Random(seed))
        draw = random.Random(seed)
        for view in views:
            left, top, right, bottom = random_resized_box((300, 400), (50, 60), draw)
            draw.random()
            shrink = 8
            while shrink > 1 and ((right - left) / shrink < 60 or (bottom - top) / shrink < 50):
                shrink //= 2
            with Image.open(path) as image:
                image.draft(None, (400 // shrink, 300 // shrink))
                assert image.size == (-(-400 // shrink), -(-300 // shrink))
                across, down = image.width / 400, image.height / 300
                box = (left * across, top * down, right * across, bottom * down)
                expected = np.asarray(image.resize((60, 50), Image.Resampling.BILINEAR, box=box))
            assert np.array_equal(view.transpose(1, 2, 0), expected)
            found.append(shrink)
    assert set(found) == {1, 2, 4}


def test_a_one_pixel_image_can_be_augmented(tmp_path: Path) -> None:
    path = str(save(tmp_path / "x.png", Image.new("RGB", (1, 1), (1, 2, 3))))
    pixels = decode_augmented(path, channels=3, height=4, width=6, views=3, flip=True, draw=random.Random(0))
    assert pixels.shape == (3, 3, 4, 6)
    assert (pixels.transpose(0, 2, 3, 1) == (1, 2, 3)).all()


def test_configs_and_seeds_need_no_torch() -> None:
    program = (
        "import sys; import mecdeploy.training.seeding, mecdeploy.training.config; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})
