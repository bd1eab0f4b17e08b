"""What any ONNX file reads, and random values of that: files of ours and of others, with one input or several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.external_data_helper import uses_external_data

from mecdeploy.runtime_checks.errors import CheckError

_SHAPE = re.compile(r"([^=]+)=(\d+(?:x\d+)*)")


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """One input. shape: batch first; a string or None where the file leaves an axis open."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        """Pixels, uint8 [N, 3, 224, 224]."""
        return f"{self.name}, {self.dtype} [{', '.join('?' if axis is None else str(axis) for axis in self.shape)}]"


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """All inputs of the file that messages call `label`, and the bytes on the disk, external data included."""

    label: str
    inputs: tuple[ModelInput, ...]
    size: int

    @property
    def batch(self) -> int | None:
        """The batch that the file fixes; None where it takes any."""
        return next((shape[0] for one in self.inputs if isinstance((shape := one.shape)[0], int)), None)


def read_inputs(path: Path) -> ModelInputs:
    """The inputs of an ONNX file, from its graph. CheckError for what is none, or reads what cannot be drawn."""
    label = path.name
    try:
        proto = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise CheckError(f"{path}: no such file. Check the path, or write it with `mecdeploy export RUN`.") from None
    except OSError as error:
        raise CheckError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from None
    except Exception:  # protobuf's DecodeError, whose module carries no types
        raise CheckError(f"{path}: not a readable ONNX file; it is truncated, damaged or something else.") from None
    if not proto.graph.node:
        raise CheckError(f"{path}: holds no ONNX graph. Give a model file.")
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = tuple(_read(label, value) for value in proto.graph.input if value.name not in constants)
    if not inputs:
        raise CheckError(f"{path}: the model reads no input, so there is nothing to time.")
    return ModelInputs(label=label, inputs=inputs, size=path.stat().st_size + _external_bytes(path, proto.graph))


def random_feed(
    model: ModelInputs, batch: int, *, shapes: Mapping[str, Sequence[int]] | None = None, seed: int = 0
) -> dict[str, NDArray[Any]]:
    """Values for every input: uint8 over its whole range, floats standard normal, other integers and booleans 0 or 1.

    shapes: input -> axes after the batch, for those that the file leaves open.
    Raises CheckError for a batch that the file does not take, and for axes that are open, or given and other ones.
    """
    given = dict(shapes or {})
    rng = np.random.default_rng(seed)
    shaped = {one: _shape(model, one, batch, given.get(one.name)) for one in model.inputs}
    try:
        return {one.name: _draw(rng, one.dtype, shape) for one, shape in shaped.items()}
    except MemoryError:
        raise CheckError(f"{model.label}: this machine has no memory for a batch of {batch}; take less.") from None


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """NAME=3x224x224 as an input's name and its axes after the batch."""
    found = _SHAPE.fullmatch(text)
    if found is None or "0" in found[2].split("x"):
        raise CheckError(f"shape {text!r} is not NAME=AxBxC; for an image of 224x224 write image=3x224x224.")
    return found[1], tuple(map(int, found[2].split("x")))


def _read(label: str, value: onnx.ValueInfoProto) -> ModelInput:
    tensor = value.type.tensor_type
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    except KeyError:
        dtype = np.dtype(object)
    if dtype.kind not in "biuf":
        raise CheckError(f"{label}: input {value.name!r} is of type {kind}; only numbers can be drawn at random.")
    if not tensor.shape.dim:
        raise CheckError(f"{label}: input {value.name!r} has no axes in the file, so none for the batch.")
    axes = (axis.dim_value or axis.dim_param or None for axis in tensor.shape.dim)
    return ModelInput(name=value.name, dtype=dtype, shape=tuple(axes))


def _shape(model: ModelInputs, one: ModelInput, batch: int, given: Sequence[int] | None) -> tuple[int, ...]:
    first, *others = one.shape
    if isinstance(first, int) and first != batch:
        raise CheckError(
            f"{model.label}: the input is {one}, so its batch is fixed at {first} and cannot be {batch}. "
            f"Take batch {first}, or export the model with a batch of any size."
        )
    if given is None and not all(isinstance(axis, int) for axis in others):
        example = "x".join(str(axis) if isinstance(axis, int) else "224" for axis in others)
        raise CheckError(
            f"{model.label}: the input is {one}, and the file leaves axes open. Give all after the batch, as in "
            f"--shape {one.name}={example}."
        )
    axes = tuple(others) if given is None else tuple(given)
    fits = len(axes) == len(others) and all(
        axis == fixed for axis, fixed in zip(axes, others, strict=True) if isinstance(fixed, int)
    )
    if not fits:
        raise CheckError(
            f"{model.label}: the input is {one}, which {'x'.join(map(str, axes))} after the batch does not fit."
        )
    return (batch, *(axis for axis in axes if isinstance(axis, int)))


def _draw(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if dtype == np.uint8:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if dtype.kind == "f":
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)
    return rng.integers(0, 2, shape).astype(dtype)  # indices of others: any table has a first and a second row


def _external_bytes(path: Path, graph: onnx.GraphProto) -> int:
    files = {
        entry.value
        for tensor in graph.initializer
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sum((path.parent / name).stat().st_size for name in files if (path.parent / name).is_file())
