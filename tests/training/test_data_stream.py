"""Images decoded when needed: the guarantees of memory, whatever the number of workers."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from mecdeploy.training.data import decode_image
from mecdeploy.training.data.decode import UnreadableImage
from mecdeploy.training.data.order import Share
from mecdeploy.training.data.source import Batch, ImageSource
from mecdeploy.training.data.stream import StreamSource
from mecdeploy.training.data.workers import _next
from mecdeploy.training.errors import TrainingError

# Python 3.12 and later warn about any fork of a process that has threads, which torch's have by then.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

COUNT, SIDE = 14, 20


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    names = []
    for index in range(COUNT):
        path = folder / f"{index:02}.png"
        Image.fromarray(rng.integers(0, 256, (25 + index, 40 - index, 3), dtype=np.uint8)).save(path)
        names.append(str(path))
    return names


def source(paths: list[str], *, workers: int = 0, flip: bool = True) -> StreamSource:
    labels = np.arange(len(paths))
    return StreamSource(paths, labels, channels=3, height=SIDE, width=SIDE, flip=flip, workers=workers)


def same(one: Iterable[Batch], two: Iterable[Batch]) -> bool:
    pairs = list(zip(one, two, strict=True))
    return bool(pairs) and all(
        torch.equal(a.labels, b.labels)
        and len(a.images) == len(b.images)
        and all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
        for a, b in pairs
    )


def by_label(batches: Iterable[Batch]) -> dict[int, torch.Tensor]:
    return {
        label: image for batch in batches for label, image in zip(batch.labels.tolist(), batch.images[0], strict=True)
    }


def test_without_a_seed_every_image_is_decode_images_in_order(paths: list[str]) -> None:
    images: ImageSource = source(paths)
    batches = list(images.batches(4))
    assert [len(batch.labels) for batch in batches] == [4, 4, 4, 2]
    assert torch.cat([batch.labels for batch in batches]).tolist() == list(range(COUNT))
    pixels = torch.cat([batch.images[0] for batch in batches])
    assert pixels.dtype == torch.uint8
    for path, got in zip(paths, pixels.numpy(), strict=True):
        assert np.array_equal(got, decode_image(path, channels=3, height=SIDE, width=SIDE))


def test_arrays_are_the_same_images(paths: list[str]) -> None:
    images = source(paths)
    (batch,) = images.batches(COUNT)
    for limit, count in ((None, COUNT), (5, 5), (0, 0)):
        pixels, labels = images.arrays(limit)
        assert np.array_equal(pixels, batch.images[0][:count].numpy())
        assert labels.dtype == np.int64 and labels.tolist() == list(range(count))


@pytest.mark.parametrize("options", [{}, {"seed": 1}, {"seed": 1, "epoch": 3, "augment": True, "views": 2}])
def test_workers_change_nothing(paths: list[str], options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = list(source(paths).batches(4, **options))
    monkeypatch.setattr("mecdeploy.training.data.stream.usable_cores", lambda: 2)
    assert same(source(paths, workers=2).batches(4, **options), alone)


def test_starting_in_the_middle_gives_the_rest_of_the_epoch_bit_for_bit(paths: list[str]) -> None:
    options = {"seed": 7, "epoch": 2, "augment": True, "views": 2}
    whole = list(source(paths).batches(4, **options))
    for step in range(len(whole)):
        assert same(source(paths).batches(4, start_step=step, **options), whole[step:])
    assert same(source(paths, workers=1).batches(4, start_step=2, **options), whole[2:])
    assert list(source(paths, workers=1).batches(4, start_step=4, **options)) == []


@pytest.mark.parametrize("options", [{}, {"seed": 1}, {"seed": 1, "augment": True, "views": 2, "start_step": 1}])
@pytest.mark.parametrize("count", [2, 3])
def test_the_shares_of_a_batch_put_together_are_the_batch(
    paths: list[str], options: dict[str, int], count: int
) -> None:
    images = source(paths)
    whole = list(images.batches(4, **options))
    shares = [list(images.batches(4, share=Share(index, count), **options)) for index in range(count)]
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


def test_an_augmented_image_depends_on_seed_epoch_and_image_only(paths: list[str]) -> None:
    reference = by_label(source(paths).batches(4, seed=1, epoch=2, augment=True))
    other_batches = by_label(source(paths).batches(5, seed=1, epoch=2, augment=True))
    assert all(torch.equal(reference[label], other_batches[label]) for label in range(COUNT))
    for seed, epoch in ((2, 2), (1, 3)):
        other = by_label(source(paths).batches(4, seed=seed, epoch=epoch, augment=True))
        assert not any(torch.equal(reference[label], other[label]) for label in range(COUNT))


def test_views_are_independent_and_the_first_is_that_of_one_view(paths: list[str]) -> None:
    (two,) = source(paths).batches(COUNT, seed=1, augment=True, views=2)
    (one,) = source(paths).batches(COUNT, seed=1, augment=True)
    assert torch.equal(one.images[0], two.images[0])
    assert not any(torch.equal(a, b) for a, b in zip(*two.images, strict=True))
    (plain,) = source(paths).batches(COUNT, seed=1, views=2)
    assert len(plain.images) == 2 and torch.equal(plain.images[0], plain.images[1])


def test_flip_mirrors_some_and_its_absence_none(paths: list[str]) -> None:
    on = by_label(source(paths).batches(4, seed=1, augment=True))
    off = by_label(source(paths, flip=False).batches(4, seed=1, augment=True))
    kept = [torch.equal(on[label], off[label]) for label in range(COUNT)]
    mirrored = [torch.equal(on[label], off[label].flip(2)) for label in range(COUNT)]
    assert all(k or m for k, m in zip(kept, mirrored, strict=True)) and any(kept) and any(mirrored)


def test_no_global_generator_is_read_or_moved(paths: list[str]) -> None:
    torch.manual_seed(0)
    random.seed(0)
    before, before_random = torch.get_rng_state(), random.getstate()
    list(source(paths, workers=1).batches(4, seed=1, augment=True))
    list(source(paths).batches(4, seed=1, augment=True))
    assert torch.equal(before, torch.get_rng_state()) and before_random == random.getstate()


def test_the_last_batch_is_dropped_on_request(paths: list[str]) -> None:
    assert [len(batch.labels) for batch in source(paths).batches(4, drop_last=True)] == [4, 4, 4]
    assert [len(batch.labels) for batch in source(paths).batches(99, drop_last=True)] == [COUNT]


def test_a_reader_that_stops_early_leaves_no_process(paths: list[str]) -> None:
    reader = source(paths, workers=1).batches(2)
    next(reader)
    assert multiprocessing.active_children()
    reader.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_in_one_line(paths: list[str], tmp_path: Path, workers: int) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(Path(paths[0]).read_bytes()[:300])
    reader = source([*paths[:4], str(bad)], workers=workers).batches(4)
    assert len(next(reader).labels) == 4
    with pytest.raises(TrainingError) as refusal:
        next(reader)
    assert str(refusal.value) == (
        f"'{bad}' is no readable image (image file is truncated). Replace or remove it, or leave such files out with "
        "--skip-bad-images (data.skip_bad_images = true)."
    )
    assert not multiprocessing.active_children()


def test_unreadable_images_are_counted_when_read_at_once(paths: list[str], tmp_path: Path) -> None:
    bad = [tmp_path / f"{i}.png" for i in range(3)]
    for path in bad:
        path.write_bytes(b"nothing")
    with pytest.raises(
        TrainingError, match=r"0\.png' is no .*\(of no known image format; 2 more cannot be read either\)"
    ):
        source([*paths, *map(str, bad)]).arrays()


def test_a_worker_that_is_killed_is_explained(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("mecdeploy.training.data.stream.decode_image", die)
    with pytest.raises(TrainingError) as refusal:
        list(source(paths, workers=1).batches(4))
    text = str(refusal.value)
    assert text.startswith("a process that decodes images ended (DataLoader worker ")
    assert text.endswith(" It may have run out of memory: data.workers is 1; set it lower, or to 0.")
    assert "\n" not in text
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("text", ["a bug", "Caught RuntimeError in DataLoader worker process 0.\nTraceback"])
def test_an_error_of_ours_is_not_taken_for_a_killed_worker(text: str) -> None:
    def fail() -> Iterator[NDArray[np.uint8] | UnreadableImage]:
        raise RuntimeError(text)
        yield

    with pytest.raises(RuntimeError) as refusal:
        _next(fail(), workers=1)
    assert str(refusal.value) == text


def test_there_are_never_more_workers_than_cores(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mecdeploy.training.data.stream.usable_cores", lambda: 1)
    others = set(multiprocessing.active_children())
    reader = source(paths, workers=8).batches(2)
    next(reader)
    assert len(set(multiprocessing.active_children()) - others) == 1
    reader.close()


def test_a_sample_is_drawn_by_its_seed(paths: list[str]) -> None:
    images = source(paths)
    everything = {image.tobytes() for image in images.arrays()[0]}
    first = [image.tobytes() for image in images.sample(6, 0)]
    assert len(set(first)) == 6 and set(first) <= everything
    assert [image.tobytes() for image in images.sample(6, 0)] == first
    assert [image.tobytes() for image in images.sample(6, 1)] != first
    assert len(images.sample(99, 0)) == COUNT


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_batches(paths: list[str]) -> None:
    options = {"seed": 1, "augment": True, "views": 2}
    on_gpu = list(source(paths, workers=1).batches(4, device="cuda", **options))
    assert all(view.is_cuda for batch in on_gpu for view in (*batch.images, batch.labels))
    back = (Batch(tuple(view.cpu() for view in batch.images), batch.labels.cpu()) for batch in on_gpu)
    assert same(back, source(paths).batches(4, **options))
