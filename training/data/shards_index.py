"""Where each image lies in tar shards of the WebDataset format: found once, kept in a file, mapped into memory."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch.utils.data import Dataset

from mecdeploy.training.data.decode import usable_cores
from mecdeploy.training.data.shards_content import COLUMNS, Content, read_shard
from mecdeploy.training.data.workers import in_workers
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.seeding import derive_seed

_FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """A tar file as it was when it was indexed. name: in its folder. size: bytes. count: images."""

    name: str
    size: int
    mtime_ns: int
    count: int = 0


@dataclass(frozen=True)
class ShardIndex:
    """The images of a folder of shards, shard by shard in the order of names: 12 bytes each, mapped from `path`.

    blocks: uint32 [n], where an image's bytes start, in blocks of 512 bytes. sizes: uint32 [n], in bytes.
    labels: uint32 [n]. ends: int64 [shards], how many images lie in this shard and those before it.
    refused: SHARD/MEMBER of images left out since they cannot be decoded. It pickles as its path.
    """

    folder: Path
    path: Path
    shards: tuple[Shard, ...]
    refused: tuple[str, ...]
    blocks: NDArray[np.uint32]
    sizes: NDArray[np.uint32]
    labels: NDArray[np.uint32]
    ends: NDArray[np.int64]

    def __reduce__(self) -> tuple[Any, ...]:
        return _read, (self.folder, self.path)


def open_index(folder: Path, *, checked: bool, workers: int) -> ShardIndex:
    """The index of folder/*.tar, read from its file, or made by `workers` processes and written there.

    The file lies in the folder, or in the user's cache where the folder cannot be written. Shards whose size and time
    of change are those of the file are not read again. checked: every image is decoded once, left out if that fails.
    TrainingError for a folder without shards, or as `read_shard`.
    """
    shards = _list_shards(folder)
    name = f".mecdeploy-index{'-checked' if checked else ''}.safetensors"
    places = [folder / name, _cache() / f"{derive_seed(str(folder.resolve())):016x}{name}"]
    with _alone(folder):  # processes that train together wait for the first
        known = next((index for place in places if (index := _read_if_good(folder, place)) is not None), None)
        if known is not None and [_stamp(shard) for shard in known.shards] == [_stamp(shard) for shard in shards]:
            return known
        return _write(folder, places, *_make(folder, shards, known, checked=checked, workers=workers))


def _list_shards(folder: Path) -> list[Shard]:
    paths = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        raise TrainingError(f"{str(folder)!r} holds no shards (*.tar, not compressed).")
    return [Shard(path.name, (status := path.stat()).st_size, status.st_mtime_ns) for path in paths]


def _stamp(shard: Shard) -> tuple[str, int, int]:
    return shard.name, shard.size, shard.mtime_ns


def _make(
    folder: Path, shards: Sequence[Shard], known: ShardIndex | None, *, checked: bool, workers: int
) -> tuple[list[Shard], list[str], dict[str, NDArray[np.uint32]]]:
    """Shards with their counts, refused images and columns; taken from the known index where a shard is unchanged."""
    kept: dict[tuple[str, int, int], Content] = {}
    if known is not None:
        for shard, end in zip(known.shards, known.ends.tolist(), strict=True):
            rows = slice(end - shard.count, end)
            refused = [name for name in known.refused if name.startswith(f"{shard.name}/")]
            columns = np.stack([known.blocks[rows], known.sizes[rows], known.labels[rows]])
            kept[_stamp(shard)] = Content(columns, refused)
    missing = [shard for shard in shards if _stamp(shard) not in kept]
    reader = _Reader(folder, checked)
    processes = min(workers, usable_cores(), len(missing))
    for shard, content in zip(missing, in_workers(reader, missing, processes), strict=True):
        kept[_stamp(shard)] = content
    contents = [kept[_stamp(shard)] for shard in shards]
    joined = [np.concatenate(parts) for parts in zip(*(content.columns for content in contents), strict=True)]
    counted = [Shard(*_stamp(s), content.columns.shape[1]) for s, content in zip(shards, contents, strict=True)]
    return counted, [name for content in contents for name in content.refused], dict(zip(COLUMNS, joined, strict=True))


@dataclass(frozen=True)
class _Reader(Dataset[Content | TrainingError]):
    """Reads through a shard, in a worker."""

    folder: Path
    checked: bool

    def __getitem__(self, shard: Shard) -> Content | TrainingError:
        try:
            return read_shard(self.folder / shard.name, checked=self.checked)
        except TrainingError as error:
            return error


def _write(
    folder: Path,
    places: Sequence[Path],
    shards: Sequence[Shard],
    refused: Sequence[str],
    columns: dict[str, NDArray[np.uint32]],
) -> ShardIndex:
    """Write the index at the first place that takes it, whole or not at all."""
    metadata = {"format": str(_FORMAT), "refused": json.dumps(refused)}
    metadata["shards"] = json.dumps([asdict(shard) for shard in shards])
    for place in places:
        temporary = place.with_name(f"{place.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            save_file(columns, temporary, metadata)
            temporary.chmod(0o644)  # safetensors makes it the owner's alone
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, place)
        except Exception as error:  # safetensors raises its own for what the system refuses
            failure = error
            with suppress(OSError):
                temporary.unlink()
        else:
            return _read(folder, place)
    raise TrainingError(f"the index of {str(folder)!r} cannot be written to {str(places[-1])!r}: {failure}.")


def _read_if_good(folder: Path, path: Path) -> ShardIndex | None:
    try:
        return _read(folder, path)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, unreadable, or of another version: it is made again


def _read(folder: Path, path: Path) -> ShardIndex:
    """Map an index file; ValueError and the like if it is not one."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if length < os.fstat(file.fileno()).st_size else {}
    metadata = header["__metadata__"]
    if metadata["format"] != str(_FORMAT):
        raise ValueError(metadata["format"])
    columns = {name: _map(path, header[name], 8 + length) for name in COLUMNS}
    shards = tuple(Shard(**shard) for shard in json.loads(metadata["shards"]))
    ends = np.cumsum([shard.count for shard in shards], dtype=np.int64)
    return ShardIndex(folder, path, shards, tuple(json.loads(metadata["refused"])), ends=ends, **columns)


def _map(path: Path, entry: dict[str, Any], start: int) -> NDArray[np.uint32]:
    """A column in the file; safetensors itself would copy it into every process."""
    (count,) = entry["shape"]
    if not count:
        return np.zeros(0, np.uint32)  # nothing can be mapped
    return np.asarray(np.memmap(path, "<u4", "r", start + entry["data_offsets"][0], (count,)))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mecdeploy"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, waiting for it; on a file system without locks, at worst the work is done twice."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
