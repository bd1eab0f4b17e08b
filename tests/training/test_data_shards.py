"""Tar shards: which images they hold, as WebDataset itself reads them, and the same batches wherever they are read."""

from __future__ import annotations

import gc
import os
import pickle
import random
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import shard_sets
import torch
import webdataset
from shard_sets import fill, load, picture, sample, write

from mecdeploy.training.config import DataConfig
from mecdeploy.training.data import ImageSource, decode_image, load_dataset
from mecdeploy.training.data.order import Share
from mecdeploy.training.data.shards_index import open_index
from mecdeploy.training.data.shards_reading import ShardFiles
from mecdeploy.training.data.source import Batch

# Python 3.12 and later warn about any fork of a process that has threads, which torch's have by then.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

SHUFFLED = {"seed": 7, "epoch": 2, "augment": True, "views": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("shards"))


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that two workers are two anywhere."""
    for module in ("stream", "shards_index"):
        monkeypatch.setattr(f"mecdeploy.training.data.{module}.usable_cores", lambda: 2)


def same(one: Iterable[Batch], two: Iterable[Batch]) -> bool:
    pairs = list(zip(one, two, strict=True))
    return bool(pairs) and all(
        torch.equal(a.labels, b.labels) and all(map(torch.equal, a.images, b.images)) for a, b in pairs
    )


def read_by_webdataset(folder: Path) -> list[tuple[bytes, int]]:
    """The witness: image bytes and labels, in order."""
    shards = sorted(map(str, folder.glob("*.tar")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves closing its files to the garbage collector
        found = [(one["png"], int(one["cls"])) for one in webdataset.WebDataset(shards, shardshuffle=False)]
        gc.collect()
    return found


def test_images_and_labels_are_those_that_webdataset_reads(root: Path) -> None:
    data = load(root)
    for part, source, count in (("train", data.train, 40), ("val", data.validation, 12)):
        witness = read_by_webdataset(root / part)
        assert len(witness) == len(source) == count
        index = open_index(root / part, checked=False, workers=0)
        files = ShardFiles(index)
        assert [files[i].data for i in range(count)] == [data for data, _ in witness]
        assert source.labels.dtype == torch.int64 and source.labels.tolist() == [label for _, label in witness]
        assert [files.name(i) for i in (0, 8)] == [
            f"{root / part}/000.tar/{'1' if part == 'val' else '0'}000.png",
            f"{root / part}/001.tar/{'1' if part == 'val' else '0'}008.png",
        ]
    assert data.class_names == ("0", "1", "2")
    assert (data.channels, data.height, data.width, data.skipped) == (3, 20, 20, ())


def test_batches_without_a_seed_are_the_images_in_order(root: Path) -> None:
    source: ImageSource = load(root).train
    batches = list(source.batches(16))
    assert [len(batch.labels) for batch in batches] == [16, 16, 8]
    assert torch.cat([batch.labels for batch in batches]).tolist() == [index % 3 for index in range(40)]
    arrays, labels = source.arrays()
    assert np.array_equal(torch.cat([batch.images[0] for batch in batches]).numpy(), arrays)
    assert labels.dtype == np.int64 and labels.tolist() == source.labels.tolist()
    assert len(source.arrays(5)[0]) == len(source.arrays(5)[1]) == 5


def test_pixels_are_those_of_an_image_folder_of_the_same_files(root: Path, tmp_path: Path) -> None:
    for part, first, count in (("train", 0, 40), ("val", 1000, 12)):
        for index in range(first, first + count):
            path = tmp_path / part / str(index % 3) / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(index))
    folder = load_dataset(DataConfig(name=f"imagefolder:{tmp_path}", image_size=20, workers=0), seed=0)
    shards = load(root)
    for ours, theirs in ((shards.train, folder.train), (shards.validation, folder.validation)):
        pairs = [
            sorted((label, image.tobytes()) for image, label in zip(*source.arrays(), strict=True))
            for source in (ours, theirs)
        ]
        assert pairs[0] == pairs[1]
    assert (shards.pixel_mean, shards.pixel_std) == (folder.pixel_mean, folder.pixel_std)  # 40 are sampled whole


def test_an_epoch_holds_every_image_once_and_another_order_each_time(root: Path) -> None:
    source = load(root).train
    everything = sorted(image.tobytes() for image in source.arrays()[0])
    orders = []
    for epoch in range(3):
        images = torch.cat([batch.images[0] for batch in source.batches(8, seed=1, epoch=epoch)]).numpy()
        orders.append([image.tobytes() for image in images])
        assert sorted(orders[-1]) == everything
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("options", [{}, {"seed": 1}, SHUFFLED])
def test_workers_change_nothing(root: Path, options: dict[str, int]) -> None:
    alone = list(load(root).train.batches(8, **options))
    assert same(load(root, workers=2).train.batches(8, **options), alone)


def test_starting_in_the_middle_gives_the_rest_of_the_epoch_bit_for_bit(root: Path) -> None:
    whole = list(load(root).train.batches(6, **SHUFFLED))
    for step in range(len(whole)):
        assert same(load(root).train.batches(6, start_step=step, **SHUFFLED), whole[step:])
    assert same(load(root, workers=2).train.batches(6, start_step=3, **SHUFFLED), whole[3:])
    assert list(load(root).train.batches(6, start_step=len(whole), **SHUFFLED)) == []


@pytest.mark.parametrize("count", [2, 3])
def test_the_shares_of_a_batch_put_together_are_the_batch(root: Path, count: int) -> None:
    source = load(root).train
    shares = [list(source.batches(13, share=Share(index, count), **SHUFFLED)) for index in range(count)]
    joined = [
        Batch(
            tuple(torch.cat(views) for views in zip(*(part.images for part in parts), strict=True)),
            torch.cat([part.labels for part in parts]),
        )
        for parts in zip(*shares, strict=True)
    ]
    assert same(joined, source.batches(13, **SHUFFLED))
    assert [[len(batch.labels) for batch in share] for share in shares][0] == [13 // count] * 3 + [0]


def test_nothing_is_read_but_what_is_asked_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load(root).train
    reads: list[int] = []
    pread = os.pread

    def counted(handle: int, size: int, start: int) -> bytes:
        reads.append(start)
        return pread(handle, size, start)

    monkeypatch.setattr("os.pread", counted)
    batches = list(source.batches(8, start_step=3, share=Share(1, 2), **SHUFFLED))
    assert len(reads) == sum(len(batch.labels) for batch in batches) == 8


def test_no_global_generator_is_read_or_moved(root: Path) -> None:
    source = load(root).train
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    list(source.batches(8, **SHUFFLED))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_jpeg_webp_and_capital_letters(tmp_path: Path) -> None:
    kinds = ("jpg", "jpeg", "JPG", "webp", "png")
    samples = [
        {
            "__key__": f"{index}",
            kind: picture(index, kind={"jpg": "JPEG", "jpeg": "JPEG"}.get(kind.lower(), kind.upper())),
            "cls": index % 2,
            "json": {"note": "not read"},
        }
        for index, kind in enumerate(kinds)
    ]
    write(tmp_path / "train", samples)
    write(tmp_path / "test", samples)
    data = load(tmp_path)
    for index, (kind, got) in enumerate(zip(kinds, data.train.arrays()[0], strict=True)):
        (tmp_path / "file").write_bytes(samples[index][kind])
        assert np.array_equal(got, decode_image(tmp_path / "file", channels=3, height=20, width=20))
    assert len(data.validation) == 5


def test_long_names_of_any_tar_writer_are_understood(tmp_path: Path) -> None:
    long = "folder/" * 30 + "x" * 150
    members = {f"{long}{i}.{end}": data for i in range(2) for end, data in (("png", picture(i)), ("cls", b"%d\n" % i))}
    for part in ("train", "val"):
        shard_sets.write_members(tmp_path / part / "long.tar", {"./README": b"no sample", **members})
    source = load(tmp_path).train
    assert source.labels.tolist() == [0, 1]
    files = ShardFiles(open_index(tmp_path / "train", checked=False, workers=0))
    assert files[1].data == picture(1) and files.name(1) == f"{tmp_path}/train/long.tar/{long}1.png"


def test_names_of_classes_sizes_and_colours(tmp_path: Path) -> None:
    fill(tmp_path, mode="L")
    (tmp_path / "classes.txt").write_text("ant\nbee\n cat\n\n")
    data = load(tmp_path, image_size=0)
    assert data.class_names == ("ant", "bee", "cat")
    assert (data.channels, data.height, data.width) == (1, 224, 224)


def test_the_statistics_come_from_a_sample_drawn_by_the_seed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mecdeploy.training.data.shards.STATISTICS_SAMPLE", 10)
    first, again, other = (load(root, seed=seed) for seed in (0, 0, 1))
    assert (first.pixel_mean, first.pixel_std) == (again.pixel_mean, again.pixel_std) != (other.pixel_mean, 0)
    assert first.pixel_mean != other.pixel_mean


# The index


def test_the_index_is_made_once_and_shared_through_its_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(root)
    assert (root / "train" / ".mecdeploy-index.safetensors").stat().st_mode & 0o777 == 0o644
    monkeypatch.setattr("mecdeploy.training.data.shards_index.read_shard", pytest.fail)
    index = open_index(root / "train", checked=False, workers=0)
    assert len(pickle.dumps(ShardFiles(index))) < 1000
    assert pickle.loads(pickle.dumps(ShardFiles(index)))[9].data == picture(9)
    arrays = (index.blocks, index.sizes, index.labels)
    assert sum(array.itemsize for array in arrays) == 12 and not any(array.flags.owndata for array in arrays)


@pytest.mark.parametrize("workers", [0, 2])
def test_only_new_and_changed_shards_are_indexed_again(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mecdeploy.training.data import shards_index

    fill(tmp_path)
    folder = tmp_path / "train"
    load(tmp_path, workers=workers)
    write(tmp_path / "more", [sample(index) for index in range(500, 505)])
    shutil.copy(tmp_path / "more" / "000.tar", folder / "0015.tar")  # between the others
    write(tmp_path / "more", [sample(index) for index in range(600, 602)])
    shutil.copy(tmp_path / "more" / "000.tar", folder / "003.tar")
    (folder / "000.tar").unlink()
    read = []
    true = shards_index.read_shard
    if not workers:  # elsewhere the list would grow in the worker
        monkeypatch.setattr(
            shards_index, "read_shard", lambda path, **options: read.append(path.name) or true(path, **options)
        )
    source = load(tmp_path, workers=workers).train
    assert read == ([] if workers else ["0015.tar", "003.tar"])
    witness = read_by_webdataset(folder)
    files = ShardFiles(open_index(folder, checked=False, workers=0))
    assert [(files[i].data, int(source.labels[i])) for i in range(len(source))] == witness


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = fill(tmp_path / "set")
    for part in ("train", "val"):  # a folder in the index's place: root may write anywhere, but not over that
        (root / part / ".mecdeploy-index.safetensors" / "full").mkdir(parents=True)
    first = list(load(root).train.batches(8, **SHUFFLED))
    assert len(list((tmp_path / "cache" / "mecdeploy").glob("*.mecdeploy-index.safetensors"))) == 2
    monkeypatch.setattr("mecdeploy.training.data.shards_index.read_shard", pytest.fail)
    assert same(load(root).train.batches(8, **SHUFFLED), first)
    assert sorted(path.name for path in (root / "val").iterdir() if path.suffix != ".tar") == [
        ".mecdeploy-index.safetensors"
    ]


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, None])
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: bytes | None) -> None:
    fill(tmp_path)
    first = list(load(tmp_path).train.batches(8, **SHUFFLED))
    index = tmp_path / "train" / ".mecdeploy-index.safetensors"
    index.write_bytes(index.read_bytes()[:-8] if damage is None else damage)
    assert same(load(tmp_path).train.batches(8, **SHUFFLED), first)
