"""A model repository of NVIDIA Triton Inference Server, to which every export adds one version of a model.

    REPOSITORY/NAME/config.pbtxt    what all versions share: input, output, batching; written once, then the user's
    REPOSITORY/NAME/labels.txt      class names, one a line
    REPOSITORY/NAME/1/model.onnx    the first version; the next is 2

Source: the chapters "Model Repository" and "Model Configuration" of Triton's user guide.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mecdeploy import run_folder
from mecdeploy.errors import UserError

CONFIG, LABELS, MODEL = "config.pbtxt", "labels.txt", "model.onnx"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LARGEST_BATCH = 64
_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}
# Triton takes a folder for a version if its name begins with a number.
_UNFINISHED = ".unfinished"

_CONFIG = """\
# Written once by mecdeploy; versions that are added later leave it alone. Batching and instances are yours to tune.
name: "{name}"
platform: "onnxruntime_onnx"
backend: "onnxruntime"
max_batch_size: {largest_batch}
input [
  {{
    name: "{input_name}"
    data_type: {input_type}
    dims: [ {input_dims} ]
  }}
]
output [
  {{
    name: "{output_name}"
    data_type: TYPE_FP32
    dims: [ {classes} ]{labels}
  }}
]
# Requests that wait already run as one batch; none waits for others to come.
dynamic_batching {{ }}
# The proof that the file computes what was trained is one for onnxruntime's CPU kernels at its default optimisation
# level, which is 0 here. Another level, an execution accelerator or a GPU instance may give other integers.
instance_group [
  {{
    count: 1
    kind: KIND_CPU
  }}
]
optimization {{
  graph {{
    level: 0
  }}
}}
"""


@dataclass(frozen=True, kw_only=True)
class _Interface:
    """What a client sees of a model, and what all versions of one model therefore share.

    dims: of the input, without the batch. labels: None for a model without class names.
    """

    input_name: str
    dtype: str
    dims: tuple[int, ...]
    output_name: str
    classes: int
    labels: tuple[str, ...] | None

    def __str__(self) -> str:
        names = "" if self.labels is None else f" ({_shortened(self.labels)})"
        return f"{self.dtype} {list(self.dims)} to {self.classes} classes{names}"


def model_name(name: str | None, run: Path | None) -> str:
    """The name itself, or that of the run's folder. Raises UserError where it cannot be a folder and part of a URL."""
    if name is None and run is None:
        raise UserError("a network of your own has no run folder to be named after; give name=, the model's name.")
    chosen = name if name is not None or run is None else run.resolve().name
    assert chosen is not None
    if NAME.fullmatch(chosen) is None:
        raise UserError(
            f"a model in a Triton repository cannot be called {chosen!r} (letters, digits, '.', '_' and '-'); "
            "give it another --name."
        )
    return chosen


def add_version(repository: Path, name: str, content: bytes) -> Path:
    """Write an exported file as the next version of a model, and return its path.

    The model is complete under a name that Triton ignores before it is renamed to its number: a server that polls
    the repository sees the whole version or none. On a failure nothing is left but what was there before.
    Raises UserError for a version that is called otherwise than the ones before it, OSError for a place that cannot
    be written.
    """
    if repository.exists() and not repository.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(repository))
    folder = repository / name
    made = [path for path in (folder, repository) if not path.exists()]
    try:
        for path in reversed(made):
            path.mkdir()
        with run_folder.locked(folder):
            return _add(folder, content)
    finally:
        for path in made:
            with suppress(OSError):  # not empty: the version is in it
                path.rmdir()


def _add(folder: Path, content: bytes) -> Path:
    """The same in a folder that no other process of ours writes to."""
    interface = _interface(content)
    versions = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    latest = max(versions, default=0)
    if latest:
        _require_same(folder, latest, interface)
    unfinished, written = folder / _UNFINISHED, list[Path]()
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    try:
        unfinished.mkdir()
        run_folder.write_atomically(unfinished / MODEL, content)
        for path, text in _shared_files(folder, interface).items():
            if not path.exists():
                written.append(path)
                run_folder.write_atomically(path, text.encode())
        version = folder / str(latest + 1)
        unfinished.rename(version)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return version / MODEL


def _shared_files(folder: Path, interface: _Interface) -> dict[Path, str]:
    """Path -> text of what lies beside the versions, in the order in which it has to appear."""
    labels = "" if interface.labels is None else f'\n    label_filename: "{LABELS}"'
    config = _CONFIG.format(
        name=folder.name,
        largest_batch=_LARGEST_BATCH,
        input_name=interface.input_name,
        input_type=_TYPES[interface.dtype],
        input_dims=", ".join(map(str, interface.dims)),
        output_name=interface.output_name,
        classes=interface.classes,
        labels=labels,
    )
    # A label is a line, whatever a class is called.
    lines = "".join(f"{' '.join(label.splitlines())}\n" for label in interface.labels or ())
    named = {} if interface.labels is None else {folder / LABELS: lines}
    return {**named, folder / CONFIG: config}


def _require_same(folder: Path, latest: int, interface: _Interface) -> None:
    path = folder / str(latest) / MODEL
    try:
        before = _interface(path.read_bytes())
    except Exception as error:  # missing, cut off, or another program's
        reason = error.strerror if isinstance(error, OSError) else "no file of `mecdeploy export`"
        raise UserError(f"{path} cannot be compared with the new version ({reason}); choose another --name.") from None
    if before != interface:
        raise UserError(
            f"{folder}: version {latest} maps {before}; the new one {interface}. Versions of a model share one "
            f"{CONFIG}; choose another --name."
        )


def _interface(content: bytes) -> _Interface:
    """Read it off the exported file."""
    import onnx

    model = onnx.load_from_string(content)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    contract = json.loads(metadata["mecdeploy.input"])
    names = json.loads(metadata.get("mecdeploy.class_names", "null"))
    (source,), (logits,) = model.graph.input, model.graph.output
    return _Interface(
        input_name=source.name,
        dtype=contract["dtype"],
        dims=(contract["channels"], contract["height"], contract["width"]),
        output_name=logits.name,
        classes=logits.type.tensor_type.shape.dim[1].dim_value,
        labels=None if names is None else tuple(names),
    )


def _shortened(labels: tuple[str, ...], most: int = 4) -> str:
    return ", ".join(labels[:most]) + (", ..." if len(labels) > most else "")
