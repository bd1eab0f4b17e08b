"""Images in memory: every batch explained pixel by pixel, and the same whenever and wherever it is asked for."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch

from mecdeploy.training.data.memory import MemorySource
from mecdeploy.training.data.order import Share
from mecdeploy.training.data.source import Batch, ImageSource
from mecdeploy.training.data.statistics import pixel_statistics
from mecdeploy.training.errors import TrainingError


def source(count: int = 50, channels: int = 3, side: int = 16, *, flip: bool = True) -> tuple[np.ndarray, MemorySource]:
    """Images without a zero or a repeated pixel row, so that each crop of each image is unmistakable."""
    pixels = np.random.default_rng(0).integers(1, 256, (count, channels, side, side), dtype=np.uint8)
    return pixels, MemorySource(pixels, np.arange(count), flip=flip)


def same(one: Iterable[Batch], two: Iterable[Batch]) -> bool:
    pairs = list(zip(one, two, strict=True))
    return bool(pairs) and all(
        torch.equal(a.labels, b.labels)
        and len(a.images) == len(b.images)
        and all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
        for a, b in pairs
    )


def explain(image: np.ndarray, original: np.ndarray, padding: int) -> tuple[int, int, bool]:
    """The one crop (top, left, mirrored) of the zero-padded original that gives this image, by trying all."""
    padded = np.pad(original, ((0, 0), (padding, padding), (padding, padding)))
    _, height, width = original.shape
    found = []
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            cut = padded[:, top : top + height, left : left + width]
            found += [(top, left, m) for m in (False, True) if np.array_equal(image, cut[:, :, ::-1] if m else cut)]
    assert len(found) == 1, f"{len(found)} crops explain this image"
    return found[0]


def test_without_a_seed_images_come_in_order_and_untouched() -> None:
    pixels, images = source()
    batches = list(images.batches(16))
    assert [len(batch.labels) for batch in batches] == [16, 16, 16, 2]
    assert np.array_equal(torch.cat([batch.images[0] for batch in batches]).numpy(), pixels)
    assert torch.cat([batch.labels for batch in batches]).tolist() == list(range(50))
    assert all(batch.images[0].dtype == torch.uint8 and batch.labels.dtype == torch.int64 for batch in batches)


def test_a_seed_shuffles_and_changes_no_pixel() -> None:
    pixels, images = source()
    labels = []
    for batch in images.batches(16, seed=1):
        labels += batch.labels.tolist()
        assert np.array_equal(batch.images[0].numpy(), pixels[batch.labels])
    assert sorted(labels) == list(range(50)) and labels != sorted(labels)


@pytest.mark.parametrize(("side", "padding"), [(16, 2), (8, 1), (32, 4)])
@pytest.mark.parametrize("flip", [True, False])
def test_every_augmented_image_is_one_crop_of_its_original(side: int, padding: int, flip: bool) -> None:
    pixels, images = source(40, side=side, flip=flip)
    crops = []
    for batch in images.batches(16, seed=3, epoch=1, augment=True):
        for image, label in zip(batch.images[0].numpy(), batch.labels.tolist(), strict=True):
            crops.append(explain(image, pixels[label], padding))
    assert len(crops) == 40
    assert {mirrored for _, _, mirrored in crops} == ({False, True} if flip else {False})
    assert len({(top, left) for top, left, _ in crops}) > (2 * padding + 1) ** 2 // 3


def test_two_views_draw_two_crops_and_the_first_is_that_of_one_view() -> None:
    pixels, images = source(32)
    (batch,) = images.batches(32, seed=3, augment=True, views=2)
    crops = [
        [explain(image, pixels[label], 2) for image, label in zip(view.numpy(), batch.labels.tolist(), strict=True)]
        for view in batch.images
    ]
    # 50 equally likely crops: 32 pairs agree 0.6 times on average, and 6 or more times in 1 of 20,000 seeds
    assert sum(a == b for a, b in zip(*crops, strict=True)) < 6
    (single,) = images.batches(32, seed=3, augment=True)
    assert torch.equal(single.images[0], batch.images[0])


def test_views_without_augmentation_are_the_same_images() -> None:
    _, images = source()
    for batch in images.batches(20, seed=3, views=3):
        assert len(batch.images) == 3 and all(torch.equal(view, batch.images[0]) for view in batch.images)


@pytest.mark.parametrize("options", [{}, {"augment": True}, {"augment": True, "views": 2}, {"drop_last": True}])
def test_starting_in_the_middle_gives_the_rest_of_the_epoch_bit_for_bit(options: dict[str, bool | int]) -> None:
    _, images = source()
    whole = list(images.batches(12, seed=7, epoch=5, **options))
    for step in range(len(whole)):
        torch.rand(step)
        _, fresh = source()
        assert same(fresh.batches(12, seed=7, epoch=5, start_step=step, **options), whole[step:])
    assert list(images.batches(12, seed=7, epoch=5, start_step=len(whole), **options)) == []


@pytest.mark.parametrize("options", [{}, {"seed": 1}, {"seed": 1, "augment": True, "views": 2, "start_step": 1}])
@pytest.mark.parametrize("count", [2, 3])
def test_the_shares_of_a_batch_put_together_are_the_batch(options: dict[str, int], count: int) -> None:
    _, images = source()
    whole = list(images.batches(12, **options))
    shares = [list(images.batches(12, share=Share(index, count), **options)) for index in range(count)]
    joined = [
        Batch(
            tuple(torch.cat(views) for views in zip(*(part.images for part in parts), strict=True)),
            torch.cat([part.labels for part in parts]),
        )
        for parts in zip(*shares, strict=True)
    ]
    assert same(joined, whole)
    if count == 3:  # the last batch has two images
        assert sorted(len(share[-1].labels) for share in shares) == [0, 1, 1]


def test_seed_and_epoch_decide_and_nothing_else() -> None:
    _, images = source()
    reference = list(images.batches(12, seed=1, epoch=2, augment=True))
    interrupted = images.batches(12, seed=9, augment=True)
    next(interrupted)
    assert same(images.batches(12, seed=1, epoch=2, augment=True), reference)
    assert not same(images.batches(12, seed=1, epoch=3, augment=True), reference)
    assert not same(images.batches(12, seed=2, epoch=2, augment=True), reference)


def test_two_epochs_can_be_read_in_turns() -> None:
    _, images = source()
    turns = list(zip(images.batches(12, seed=1, epoch=0), images.batches(12, seed=1, epoch=1), strict=True))
    assert same((first for first, _ in turns), images.batches(12, seed=1, epoch=0))
    assert same((second for _, second in turns), images.batches(12, seed=1, epoch=1))


def test_no_global_generator_is_read_or_moved() -> None:
    _, images = source()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(images.batches(12, seed=1, augment=True, views=2))
    assert torch.equal(before, torch.get_rng_state())


def test_the_last_batch_is_dropped_on_request_unless_it_is_the_only_one() -> None:
    _, images = source(50)
    assert [len(batch.labels) for batch in images.batches(16, drop_last=True)] == [16, 16, 16]
    assert [len(batch.labels) for batch in images.batches(25, drop_last=True)] == [25, 25]
    assert [len(batch.labels) for batch in images.batches(128, drop_last=True)] == [50]


def test_a_batch_is_a_copy() -> None:
    pixels, images = source()
    for options in ({}, {"seed": 1}, {"seed": 1, "augment": True}):
        for batch in images.batches(50, **options):
            batch.images[0].zero_()
            batch.labels.zero_()
    got, labels = images.arrays()
    got[:] = 0
    assert np.array_equal(images.arrays()[0], pixels) and images.labels.tolist() == labels.tolist() == list(range(50))


def test_arrays_are_the_first_images_in_order() -> None:
    pixels, images = source()
    for limit, count in ((None, 50), (7, 7), (0, 0), (99, 50)):
        got, labels = images.arrays(limit)
        assert got.dtype == np.uint8 and labels.dtype == np.int64
        assert np.array_equal(got, pixels[:count]) and labels.tolist() == list(range(count))


def test_channels_last_arrays_are_taken_as_they_are_seen() -> None:
    pixels, _ = source()
    seen = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    images = MemorySource(seen, np.zeros(50, np.int16), flip=True)
    assert np.array_equal(images.arrays()[0], pixels)
    assert images.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"start_step": -1}, "start_step is -1; it must be at least 0"),
        ({"views": 0}, "views is 0; it must be at least 1"),
        ({"augment": True}, "augment needs a seed"),
    ],
)
def test_a_senseless_request_is_refused_when_it_is_made(options: dict[str, int], text: str) -> None:
    _, images = source()
    with pytest.raises(ValueError, match=text):
        images.batches(**{"batch_size": 4, **options})


def test_it_is_an_image_source() -> None:
    images: ImageSource = source()[1]
    assert len(images) == 50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("free", [0, 1 << 40])
def test_a_gpu_gives_the_same_batches_resident_or_not(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, images = source()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    on_gpu = list(images.batches(12, device="cuda", seed=1, augment=True, views=2))
    assert all(view.is_cuda for batch in on_gpu for view in (*batch.images, batch.labels))
    back = (Batch(tuple(view.cpu() for view in batch.images), batch.labels.cpu()) for batch in on_gpu)
    assert same(back, images.batches(12, seed=1, augment=True, views=2))


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (7, 3, 5, 4)])
def test_statistics_are_numpys(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    mean, std = pixel_statistics(pixels)
    assert mean == pytest.approx(pixels.astype(np.float64).mean(), rel=1e-12)  # float64 sums
    assert std == pytest.approx(pixels.astype(np.float64).std(), rel=1e-12)


def test_statistics_of_more_pixels_than_are_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (9, 3, 5, 4), dtype=np.uint8)
    expected = pixel_statistics(pixels)
    monkeypatch.setattr("mecdeploy.training.data.statistics._CHUNK", 7)
    assert pixel_statistics(pixels) == expected


def test_statistics_do_not_lose_one_deviating_pixel_among_millions() -> None:
    pixels = np.full((4, 1, 1000, 1000), 255, np.uint8)
    pixels[0, 0, 0, 0] = 254
    count = pixels.size
    _, std = pixel_statistics(pixels)
    assert std == pytest.approx(((count - 1) / count**2) ** 0.5, rel=1e-12)  # the binomial's, in closed form


def test_equal_pixels_cannot_be_normalised() -> None:
    with pytest.raises(TrainingError, match=r"^every pixel of the training images is 7; check the images\.$"):
        pixel_statistics(np.full((3, 1, 2, 2), 7, np.uint8))
