"""The named data sets: digits as scikit-learn has them; the others from tiny copies in their real on-disk formats."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import urllib.error
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets
from sklearn import datasets

from mecdeploy.training.config import DataConfig
from mecdeploy.training.data import ImageDataset, available_datasets, load_dataset
from mecdeploy.training.errors import TrainingError

RNG = np.random.default_rng(0)
DIGITS_LABELS = [0, 3, 0, 2, 4, 1, 3, 4, 4, 5, 8, 0]
DIGITS_SHA256 = "ea4895befd3f196cfabfca9a1c53d98b9c6fb71539a500749a1f351a2282cdd7"
NOWHERE = "http://127.0.0.1:9/"  # the discard port: nothing answers there


def load(name: str, **options: Any) -> ImageDataset:
    return load_dataset(DataConfig(name=name, **options), seed=0)


def refusal(name: str, **options: Any) -> str:
    with pytest.raises(TrainingError) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def mirrors(data: ImageDataset) -> bool:
    """Whether augmentation mirrors: some image equals a mirrored crop of its original and no plain crop."""
    pixels, _ = data.train.arrays()
    padding = min(4, data.height // 8)
    height, width = data.height, data.width
    found = False
    for view in next(iter(data.train.batches(16, seed=0, augment=True))).images[0].numpy():
        kinds = set()
        for original in pixels:
            padded = np.pad(original, ((0, 0), (padding, padding), (padding, padding)))
            for top in range(2 * padding + 1):
                for left in range(2 * padding + 1):
                    cut = padded[:, top : top + height, left : left + width]
                    kinds |= {"plain"} if np.array_equal(cut, view) else set()
                    kinds |= {"mirrored"} if np.array_equal(cut[:, :, ::-1], view) else set()
        assert kinds
        found |= kinds == {"mirrored"}
    return found


# Digits


def test_digits_are_scikit_learns_times_fifteen() -> None:
    data = load("digits")
    assert (data.channels, data.height, data.width) == (1, 8, 8)
    assert data.class_names == tuple("0123456789")
    assert (len(data.train), len(data.validation)) == (1437, 360)
    original = datasets.load_digits()
    expected = sorted(zip((original.data * 15).astype(int).tolist(), original.target.tolist(), strict=True))
    got = []
    for source in (data.train, data.validation):
        pixels, labels = source.arrays()
        assert pixels.max() == 240
        got += zip(pixels.reshape(-1, 64).astype(int).tolist(), labels.tolist(), strict=True)
    assert sorted(got) == expected


def test_digits_validation_never_moves() -> None:
    """Pinned: another split would make accuracies incomparable and leak training images into old runs' validation."""
    pixels, labels = load("digits").validation.arrays()
    assert labels[:12].tolist() == DIGITS_LABELS
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == DIGITS_SHA256
    other = load_dataset(DataConfig(name="digits", validation_fraction=0.5), seed=99)
    assert np.array_equal(other.validation.arrays()[0], pixels)


def test_digits_are_split_by_class() -> None:
    data = load("digits")
    whole = np.bincount(datasets.load_digits().target)
    held_out = np.bincount(data.validation.labels.numpy())
    assert np.abs(held_out - whole * 360 / 1797).max() < 1


def test_digits_are_not_mirrored() -> None:
    data = load("digits")
    views = next(iter(data.train.batches(400, seed=0, augment=True)))
    originals = data.train.arrays()[0]
    by_label = {label: originals[data.train.labels.numpy() == label] for label in range(10)}
    for image, label in zip(views.images[0].numpy()[:60], views.labels.tolist(), strict=False):
        padded = np.pad(by_label[label], ((0, 0), (0, 0), (1, 1), (1, 1)))
        cuts = [padded[:, :, top : top + 8, left : left + 8] for top in range(3) for left in range(3)]
        assert any((cut == image).all(axis=(1, 2, 3)).any() for cut in cuts)


def test_digits_statistics() -> None:
    data = load("digits")
    pixels = data.train.arrays()[0].astype(np.float64)
    assert (data.pixel_mean, data.pixel_std) == pytest.approx((pixels.mean(), pixels.std()), rel=1e-12)


# CIFAR


def as_python_2_wrote(entry: dict[str, Any]) -> bytes:
    """Pickle as the published batches are: protocol 2, with the dtype's flags as the integers 0 and 1."""
    written = pickle.dumps(entry, protocol=2)
    if b"dtype" in written:
        assert b"\x89\x88\x87" in written
        written = written.replace(b"\x89\x88\x87", b"K\x00K\x01\x87")
    return written


class Cifar:
    """A tiny copy of CIFAR-10 or CIFAR-100 as it lies on disk, and torchvision told its checksums."""

    def __init__(self, root: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.source = getattr(torchvision.datasets, kind)
        self.folder = root / self.source.base_folder
        self.folder.mkdir(parents=True)
        ten = kind == "CIFAR10"
        self.pixels: dict[str, np.ndarray] = {}
        self.labels: dict[str, list[int]] = {}
        self.class_names = [f"class {i}" for i in range(10 if ten else 100)]
        for table in ("train_list", "test_list"):
            checked = []
            for name, _ in getattr(self.source, table):
                self.pixels[name] = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
                self.labels[name] = RNG.integers(0, len(self.class_names), 4).tolist()
                key = "labels" if ten else "fine_labels"
                entry = {"data": self.pixels[name], key: self.labels[name], "filenames": ["x.png"] * 4}
                checked.append([name, self._write(name, entry)])
            monkeypatch.setattr(self.source, table, checked)
        meta = dict(self.source.meta)
        meta["md5"] = self._write(meta["filename"], {meta["key"]: self.class_names})
        monkeypatch.setattr(self.source, "meta", meta)
        monkeypatch.setattr(self.source, "url", NOWHERE + "cifar.tar.gz")

    def _write(self, name: str, entry: dict[str, Any]) -> str:
        content = as_python_2_wrote(entry)
        (self.folder / name).write_bytes(content)
        return hashlib.md5(content).hexdigest()


@pytest.mark.parametrize(("name", "kind"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
@pytest.mark.parametrize("download", [True, False])
def test_cifar_from_disk(tmp_path: Path, name: str, kind: str, download: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Cifar(tmp_path, kind, monkeypatch)
    data = load(name, root=str(tmp_path), download=download)
    assert (data.channels, data.height, data.width) == (3, 32, 32)
    assert data.class_names == tuple(copy.class_names)
    for source, files in ((data.train, copy.source.train_list), (data.validation, copy.source.test_list)):
        pixels, labels = source.arrays()
        # on disk a row is 1024 red, 1024 green, 1024 blue pixels, each row by row
        expected = np.concatenate([copy.pixels[file] for file, _ in files]).reshape(-1, 3, 32, 32)
        assert np.array_equal(pixels, expected) and pixels.dtype == np.uint8
        assert labels.tolist() == [label for file, _ in files for label in copy.labels[file]]
    train = data.train.arrays()[0].astype(np.float64)
    assert (data.pixel_mean, data.pixel_std) == pytest.approx((train.mean(), train.std()), rel=1e-12)
    assert mirrors(data) and not mirrors(load(name, root=str(tmp_path), flip=False))


def test_numpys_warning_of_old_pickles_is_not_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cifar(tmp_path, "CIFAR10", monkeypatch)
    read = pickle.load

    def warn_as_numpy_2_4_0_does(*arguments: Any, **options: Any) -> Any:
        warnings.warn("dtype(): align should be passed as Python or NumPy boolean but got `align=0`.", stacklevel=2)
        return read(*arguments, **options)

    monkeypatch.setattr(pickle, "load", warn_as_numpy_2_4_0_does)
    assert len(load("cifar10", root=str(tmp_path)).train) == 20


def test_cifar_unpacked_from_a_downloaded_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Cifar(tmp_path / "made", "CIFAR10", monkeypatch)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        tar.add(copy.folder, arcname=copy.source.base_folder)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / copy.source.filename).write_bytes(archive.getvalue())
    monkeypatch.setattr(copy.source, "tgz_md5", hashlib.md5(archive.getvalue()).hexdigest())
    assert load("cifar10", root=str(tmp_path / "root")).class_names == tuple(copy.class_names)


def test_cifar_that_is_not_there_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", NOWHERE + "cifar.tar.gz")
    place = f"'{tmp_path}/cifar-10-batches-py'"
    assert refusal("cifar10", root=str(tmp_path), download=False) == (
        f"cifar10: no intact copy at {place} and none could be made (Dataset not found or corrupted). "
        f"Set data.download = true, or put the unpacked files of {NOWHERE}cifar.tar.gz "
        "there; data.root sets the folder."
    )
    text = refusal("cifar10", root=str(tmp_path), download=True)
    assert text.startswith(f"cifar10: no intact copy at {place} and none could be made ([Errno ")
    assert "refused" in text
    assert "). Allow network access once, or put the unpacked files of " in text


def test_a_damaged_cifar_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Cifar(tmp_path, "CIFAR10", monkeypatch)
    damaged = copy.folder / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "no intact copy" in refusal("cifar10", root=str(tmp_path), download=False)


def test_a_root_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", NOWHERE + "cifar.tar.gz")
    assert "no intact copy" in refusal("cifar10", root=str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (urllib.error.URLError(OSError(-3, "Temporary failure in name resolution")), "name resolution"),
        (urllib.error.HTTPError("u", 503, "Service Unavailable", {}, None), "Service Unavailable"),  # type: ignore[arg-type]
        (EOFError(), "EOFError"),
        (RuntimeError("Error downloading:\nTried 3 mirrors"), "(Error downloading:)"),
    ],
)
def test_whatever_goes_wrong_is_said_in_one_line(
    tmp_path: Path, error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fail)
    assert reason in refusal("cifar10", root=str(tmp_path))


# Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    """The IDX format: two zero bytes, type 8 (unsigned byte), number of dimensions, sizes as big-endian int32, data."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_fashion(raw: Path) -> dict[str, np.ndarray]:
    raw.mkdir(parents=True)
    arrays = {}
    for part, count in (("train", 6), ("t10k", 4)):
        arrays[f"{part}-images-idx3-ubyte"] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = RNG.integers(0, 10, count, dtype=np.uint8)
    for name, array in arrays.items():
        (raw / name).write_bytes(idx(array))
    return arrays


def test_fashion_mnist_from_disk(tmp_path: Path) -> None:
    arrays = write_fashion(tmp_path / "FashionMNIST" / "raw")
    data = load("fashion-mnist", root=str(tmp_path))
    assert (data.channels, data.height, data.width) == (1, 28, 28)
    assert data.class_names[0] == "T-shirt/top" and len(data.class_names) == 10
    for source, part in ((data.train, "train"), (data.validation, "t10k")):
        pixels, labels = source.arrays()
        assert np.array_equal(pixels[:, 0], arrays[f"{part}-images-idx3-ubyte"])
        assert np.array_equal(labels, arrays[f"{part}-labels-idx1-ubyte"])
    assert mirrors(data)


def test_fashion_mnist_unpacked_from_its_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    arrays = write_fashion(raw)
    source = torchvision.datasets.FashionMNIST
    resources = []
    for name in arrays:
        packed = gzip.compress((raw / name).read_bytes())
        (raw / name).unlink()
        (raw / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(source, "resources", resources)
    monkeypatch.setattr(source, "mirrors", [NOWHERE])
    assert len(load("fashion-mnist", root=str(tmp_path)).train) == 6


def test_a_truncated_fashion_mnist(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    write_fashion(raw)
    damaged = raw / "train-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:500])
    text = refusal("fashion-mnist", root=str(tmp_path))
    assert text.startswith(f"fashion-mnist: no intact copy at '{tmp_path}/FashionMNIST/raw' and none could be made (")


def test_fashion_mnist_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [NOWHERE])
    for download in (True, False):
        text = refusal("fashion-mnist", root=str(tmp_path), download=download)
        assert f"'{tmp_path}/FashionMNIST/raw'" in text and NOWHERE in text


# All of them


def test_sets_of_a_fixed_size_are_not_resized() -> None:
    assert load("digits", image_size=8).height == 8
    assert refusal("digits", image_size=32) == (
        "data.image_size is 32, but digits has images of 8x8 pixels; leave it 0 (image folders are the ones that are "
        "resized)."
    )


def test_the_names() -> None:
    names = ("digits", "cifar10", "cifar100", "fashion-mnist", "imagefolder:PATH", "shards:PATH")
    assert available_datasets() == names
