"""One checkpoint, one file: tensors in safetensors, everything else as JSON in its header. Never pickle.

A file appears whole or not at all (temporary name, fsync, rename, fsync of the folder), and carries a digest over its
tensors and its JSON, so that damage is found when it is read and not when it is deployed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mecdeploy.training.errors import TrainingError

FORMAT = 1
FINAL = "checkpoint-final.safetensors"
STAGE_ORDER = ("fp32", "calibrate", "qat", "deploy")

_HEADER_KEY = "mecdeploy.checkpoint"
_DIGEST_KEY = "mecdeploy.sha256"
_NAME = re.compile(r"checkpoint-(fp32|qat|deploy)-(\d+)(?:-step-(\d+))?\.safetensors")


@dataclass(frozen=True, order=True)
class Position:
    """How far a run has come: `epoch` whole epochs of `stage` and `step` steps of the next one are done."""

    stage_index: int
    epoch: int
    step: int

    @classmethod
    def of(cls, stage: str, epoch: int, step: int) -> Position:
        """The position in the named stage."""
        return cls(STAGE_ORDER.index(stage), epoch, step)

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return STAGE_ORDER[self.stage_index]

    @property
    def file_name(self) -> str:
        """What a checkpoint of this position is called."""
        middle = f"-step-{self.step:06d}" if self.step else ""
        return f"checkpoint-{self.stage}-{self.epoch:04d}{middle}.safetensors"

    @classmethod
    def from_file_name(cls, name: str) -> Position | None:
        """The position a file name tells; None for any other file."""
        match = _NAME.fullmatch(name)
        return None if match is None else cls.of(match[1], int(match[2]), int(match[3] or 0))


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    tensors: on the CPU, by dotted name, such as "float.conv1.weight", "model....", "momentum....".
    header: the JSON part: format, config, position, metrics, class names, input.
    """

    tensors: dict[str, Tensor]
    header: dict[str, Any]

    def section(self, prefix: str) -> dict[str, Tensor]:
        """Tensors under "prefix.", without it."""
        start = f"{prefix}."
        return {name[len(start) :]: tensor for name, tensor in self.tensors.items() if name.startswith(start)}


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write atomically; an existing file of that name is replaced only by a complete new one.

    tensors: any device, layout or aliasing; each name gets its own contiguous copy. header: JSON-able.
    Raises TrainingError, writing nothing, when a tensor holds NaN or infinity; OSError when the folder cannot take the
    file (full, read-only, gone), leaving no temporary file behind.
    """
    copies = {name: _contiguous_copy(tensor) for name, tensor in tensors.items()}
    for name, tensor in copies.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TrainingError(f"{name} is not finite; {path.name} was not written. Lower the learning rate.")
    text = json.dumps({"format": FORMAT, **header}, sort_keys=True, allow_nan=False)
    metadata = {_HEADER_KEY: text, _DIGEST_KEY: _content_digest(copies, text)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = stat.S_IMODE(
            temporary.stat().st_mode
        )  # what the user's umask gives; safetensors makes files of mode 0600
        try:
            save_file(copies, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        temporary.chmod(mode)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the error to tell is the first one
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def read_header(path: Path) -> dict[str, Any]:
    """The JSON part alone, without reading tensors. Raises TrainingError for a foreign or truncated file."""
    with _opened(path) as file:
        return _header(path, file.metadata())


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint. Raises TrainingError naming the file when it is truncated, damaged or not ours."""
    with _opened(path) as file:
        metadata = file.metadata()
        header = _header(path, metadata)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if _content_digest(tensors, metadata[_HEADER_KEY]) != metadata.get(_DIGEST_KEY):
        raise TrainingError(f"{path} is damaged: its contents do not match its digest. Use another checkpoint.")
    return Checkpoint(tensors, header)


def is_checkpoint(path: Path) -> bool:
    """Whether a readable safetensors file was written by `write_checkpoint`. TrainingError if it cannot be read."""
    with _opened(path) as file:
        return _HEADER_KEY in (file.metadata() or {})


def file_sha256(path: Path) -> str:
    """Hex digest of the file's bytes, as `sha256sum` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise TrainingError(f"{path} is not a file; name a checkpoint-*.safetensors.")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path} is no readable safetensors file ({error}); it is truncated or foreign.") from error


def _header(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(_HEADER_KEY)
    if text is None:
        raise TrainingError(f"{path} holds tensors, but is not a mecdeploy checkpoint.")
    try:
        header = json.loads(text)
    except json.JSONDecodeError as error:
        raise TrainingError(f"{path} is damaged: its header is not JSON ({error}).") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise TrainingError(f"{path} has checkpoint format {found}; this version reads format {FORMAT}.")
    return header


def _contiguous_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _content_digest(tensors: Mapping[str, Tensor], header: str) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
