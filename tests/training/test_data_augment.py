"""Batch augmentation against a loop over pixels."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mecdeploy.training.data.augment import Crops, crop_batch, crop_padding, draw_crops
from mecdeploy.training.data.geometry import covering_size, random_resized_box


def one_pixel_at_a_time(images: np.ndarray, crops: Crops, padding: int) -> np.ndarray:
    count, channels, height, width = images.shape
    out = np.zeros_like(images)
    for i in range(count):
        for y in range(height):
            for x in range(width):
                column = width - 1 - x if crops.mirrored[i] else x
                from_y = y + int(crops.tops[i]) - padding
                from_x = column + int(crops.lefts[i]) - padding
                if 0 <= from_y < height and 0 <= from_x < width:
                    out[i, :, y, x] = images[i, :, from_y, from_x]
    return out


@pytest.mark.parametrize(
    ("channels", "height", "width", "padding"),
    [(3, 32, 32, 4), (1, 8, 8, 1), (1, 28, 28, 3), (3, 9, 17, 2), (3, 5, 4, 0), (1, 1, 1, 0), (3, 2, 3, 4)],
)
@pytest.mark.parametrize("flip", [True, False])
def test_crops_equal_the_loop(channels: int, height: int, width: int, padding: int, flip: bool) -> None:
    rng = np.random.default_rng(height)
    images = rng.integers(1, 256, (7, channels, height, width), dtype=np.uint8)
    original = images.copy()
    (crops,) = draw_crops(7, 1, padding=padding, flip=flip, seed=1, epoch=2, step=3)
    out = crop_batch(torch.from_numpy(images), crops, padding)
    assert out.dtype == torch.uint8
    assert np.array_equal(out.numpy(), one_pixel_at_a_time(images, crops, padding))
    assert np.array_equal(images, original)


def test_every_corner_of_the_padding_and_both_mirrorings() -> None:
    images = torch.arange(1, 17, dtype=torch.uint8).reshape(1, 1, 4, 4).expand(18, 1, 4, 4).contiguous()
    grid = [(top, left, mirrored) for top in range(3) for left in range(3) for mirrored in (False, True)]
    tops, lefts, mirrored = (torch.tensor(column) for column in zip(*grid, strict=True))
    out = crop_batch(images, Crops(tops, lefts, mirrored), 1)
    assert np.array_equal(out.numpy(), one_pixel_at_a_time(images.numpy(), Crops(tops, lefts, mirrored), 1))
    assert out[0, 0].tolist() == [[0, 0, 0, 0], [0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11]]
    assert out[1, 0].tolist() == [[0, 0, 0, 0], [3, 2, 1, 0], [7, 6, 5, 0], [11, 10, 9, 0]]
    assert out[8, 0].tolist() == images[0, 0].tolist()  # the middle


@pytest.mark.parametrize(
    ("height", "width", "padding"),
    [(32, 32, 4), (8, 8, 1), (28, 28, 3), (64, 64, 4), (7, 32, 0), (16, 64, 2), (1, 1, 0)],
)
def test_padding_is_an_eighth_and_at_most_four(height: int, width: int, padding: int) -> None:
    assert crop_padding(height, width) == padding


def test_crops_are_uniform_and_independent_of_each_other() -> None:
    first, second = draw_crops(20_000, 2, padding=4, flip=True, seed=0, epoch=0, step=0)
    for crops in (first, second):
        for corner in (crops.tops, crops.lefts):
            # 20,000 draws over 9 values: 2222 expected, standard deviation 44; 5 of them either way
            assert all(abs(int(count) - 2222) < 222 for count in torch.bincount(corner, minlength=9))
            assert int(corner.max()) == 8
        assert abs(int(crops.mirrored.sum()) - 10_000) < 354  # 5 standard deviations
    pairs = torch.stack([first.tops, first.lefts, second.tops, second.lefts, first.mirrored, second.mirrored]).double()
    correlation = torch.corrcoef(pairs) - torch.eye(6)
    assert correlation.abs().max() < 0.036  # 5 / sqrt(20,000)


def test_crops_depend_on_seed_epoch_and_step_only() -> None:
    def drawn(seed: int = 0, epoch: int = 0, step: int = 0, views: int = 1) -> list[int]:
        torch.rand(3)  # whatever happens to the global generator
        return draw_crops(16, views, padding=4, flip=True, seed=seed, epoch=epoch, step=step)[0].tops.tolist()

    assert drawn() == drawn() == drawn(views=2)
    assert len({tuple(drawn(*key)) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}) == 4


def test_without_flip_nothing_is_mirrored_and_corners_stay_the_same() -> None:
    (with_flip,) = draw_crops(64, 1, padding=4, flip=True, seed=5, epoch=0, step=0)
    (without,) = draw_crops(64, 1, padding=4, flip=False, seed=5, epoch=0, step=0)
    assert not without.mirrored.any() and with_flip.mirrored.any()
    assert torch.equal(with_flip.tops, without.tops) and torch.equal(with_flip.lefts, without.lefts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_cuts_the_same_pixels() -> None:
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    (crops,) = draw_crops(64, 1, padding=4, flip=True, seed=5, epoch=0, step=0)
    assert torch.equal(crop_batch(images.cuda(), crops, 4).cpu(), crop_batch(images, crops, 4))


SIDES = st.integers(1, 2000)


@given(height=SIDES, width=SIDES, target_height=st.integers(1, 300), target_width=st.integers(1, 300))
def test_the_covering_size_covers_and_keeps_the_aspect(
    height: int, width: int, target_height: int, target_width: int
) -> None:
    new_height, new_width = covering_size((height, width), (target_height, target_width))
    assert new_height >= target_height and new_width >= target_width
    assert new_height == target_height or new_width == target_width
    scale = max(target_height / height, target_width / width)
    # the exact sides to half a pixel, and float64's error in this witness
    assert abs(new_height - height * scale) <= 0.5 + 1e-6 and abs(new_width - width * scale) <= 0.5 + 1e-6


def test_covering_sizes_worked_out_by_hand() -> None:
    assert covering_size((480, 640), (224, 224)) == (224, 299)  # 298.67
    assert covering_size((640, 480), (224, 224)) == (299, 224)
    assert covering_size((10, 10), (32, 32)) == (32, 32)
    assert covering_size((4, 6), (1, 1)) == (1, 2)  # 1.5, half up
    assert covering_size((4, 10), (1, 1)) == (1, 3)  # 2.5, half up, not to even
    assert covering_size((100, 100), (20, 40)) == (40, 40)


@given(height=SIDES, width=SIDES, target=st.tuples(st.integers(1, 300), st.integers(1, 300)), seed=st.integers(0, 999))
def test_a_random_box_lies_in_the_image(height: int, width: int, target: tuple[int, int], seed: int) -> None:
    left, top, right, bottom = random_resized_box((height, width), target, random.Random(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_random_boxes_have_the_published_areas_and_aspects() -> None:
    draw = random.Random(0)
    boxes = [random_resized_box((400, 600), (100, 100), draw) for _ in range(3000)]
    areas = [(right - left) * (bottom - top) / 240_000 for left, top, right, bottom in boxes]
    aspects = [(right - left) / (bottom - top) for left, top, right, bottom in boxes]
    # rounding a side of at least 110 pixels to an integer moves areas and aspects by less than 1%
    assert 0.0792 < min(areas) < 0.1 and 0.8 < max(areas) < 1.01
    assert 0.7425 < min(aspects) < 0.77 and 1.3 < max(aspects) < 1.3467
    wide = [random_resized_box((400, 600), (100, 200), draw) for _ in range(500)]
    assert all(1.485 < (right - left) / (bottom - top) < 2.693 for left, top, right, bottom in wide)


def test_an_image_too_long_for_any_box_gives_its_centre() -> None:
    assert random_resized_box((1000, 10), (32, 32), random.Random(0)) == (0, 493, 10, 506)  # 10 / (3/4) = 13 rows
    assert random_resized_box((10, 1000), (32, 32), random.Random(0)) == (493, 0, 506, 10)  # 10 * 4/3 = 13 columns
