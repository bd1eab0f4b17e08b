"""Tensors of the Open Inference Protocol: datatypes, and values as JSON or as bytes.

Source: Open Inference Protocol, "Tensor Data Types" and the binary tensor data extension.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecdeploy.serving.errors import Refusal

# Datatype -> its numpy type and onnxruntime's name for it. Strings (BYTES) are left out: no classifier reads them.
_TYPES = {
    "BOOL": (np.bool_, "tensor(bool)"),
    "UINT8": (np.uint8, "tensor(uint8)"),
    "UINT16": (np.uint16, "tensor(uint16)"),
    "UINT32": (np.uint32, "tensor(uint32)"),
    "UINT64": (np.uint64, "tensor(uint64)"),
    "INT8": (np.int8, "tensor(int8)"),
    "INT16": (np.int16, "tensor(int16)"),
    "INT32": (np.int32, "tensor(int32)"),
    "INT64": (np.int64, "tensor(int64)"),
    "FP16": (np.float16, "tensor(float16)"),
    "FP32": (np.float32, "tensor(float)"),
    "FP64": (np.float64, "tensor(double)"),
}
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(dtype) for name, (dtype, _) in _TYPES.items()}
DATATYPE_OF = {runtime: name for name, (_, runtime) in _TYPES.items()}
BATCH = -1
_VALUES: dict[str, set[type]] = {"b": {bool}, "f": {int, float}}
"""Kind of numpy type -> what Python reads from JSON for it; integers only for all others."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """An input or output of a model. shape: its first entry is BATCH where the number of rows is free."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type, little-endian as on the wire."""
        return DTYPES[self.datatype].newbyteorder("<")

    def to_json(self) -> dict[str, Any]:
        """As the protocol's model metadata has it."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}

    def check(self, datatype: object, shape: object) -> tuple[int, ...]:
        """The shape of a tensor that a client says it sends. Refuses one that the model does not take."""
        if datatype != self.datatype:
            raise Refusal(400, f"input {self.name!r} has datatype {datatype!r}; the model reads {self.datatype}.")
        if not isinstance(shape, list) or any(type(size) is not int for size in shape):
            raise Refusal(400, f"input {self.name!r} needs a shape, a list of integers.")
        fits = len(shape) == len(self.shape) and all(
            size >= 1 if expected == BATCH else size == expected
            for size, expected in zip(shape, self.shape, strict=True)
        )
        if not fits:
            got = str(shape) if len(shape) <= 16 else f"{len(shape)} dimensions"
            raise Refusal(400, f"input {self.name!r} has shape {got}; the model reads {list(self.shape)}.")
        return tuple(shape)


def from_json(spec: TensorSpec, shape: tuple[int, ...], data: object) -> NDArray[Any]:
    """The values of a tensor, nested as its shape or flat in row-major order."""
    if not isinstance(data, list):
        raise Refusal(400, f"input {spec.name!r} needs data, a list of values.")
    found, values = _flatten(spec, data)
    if found not in (shape, (prod(shape),)):
        raise Refusal(400, f"input {spec.name!r} has shape {list(shape)}, but its data has shape {list(found)}.")
    allowed: set[type] = _VALUES.get(spec.dtype.kind, {int})
    strangers = sorted(kind.__name__ for kind in set(map(type, values)) - allowed)
    if strangers:
        expected = " or ".join(sorted(kind.__name__ for kind in allowed))
        raise Refusal(400, f"input {spec.name!r} holds {', '.join(strangers)}; {spec.datatype} is {expected}.")
    if spec.dtype.kind in "iu" and values:
        limits = np.iinfo(spec.dtype)
        if min(values) < limits.min or max(values) > limits.max:
            raise Refusal(400, f"input {spec.name!r} holds a number outside {limits.min} to {limits.max}.")
    try:
        array: NDArray[Any] = np.array(values, dtype=np.float64 if spec.dtype.kind == "f" else spec.dtype)
    except OverflowError:
        raise Refusal(400, f"input {spec.name!r} holds a number that {spec.datatype} cannot hold.") from None
    with np.errstate(over="ignore"):  # what overflows is refused as infinite
        array = array.astype(spec.dtype)
    return _finite(spec, array.reshape(shape))


def from_bytes(spec: TensorSpec, shape: tuple[int, ...], content: memoryview) -> NDArray[Any]:
    """The values of a tensor, little-endian in row-major order; copied only where they are not aligned."""
    expected = prod(shape) * spec.dtype.itemsize
    if len(content) != expected:
        raise Refusal(
            400,
            f"input {spec.name!r} of shape {list(shape)} and datatype {spec.datatype} takes {expected} bytes; "
            f"binary_data_size is {len(content)}.",
        )
    array: NDArray[Any] = np.require(np.frombuffer(content, dtype=spec.dtype).reshape(shape), requirements="A")
    if spec.datatype == "BOOL" and array.view(np.uint8).max(initial=0) > 1:
        raise Refusal(400, f"input {spec.name!r} holds a byte other than 0 and 1; BOOL is one of them.")
    return _finite(spec, array)


def to_bytes(spec: TensorSpec, array: NDArray[Any]) -> bytes:
    """The values of an output, little-endian in row-major order."""
    return array.astype(spec.dtype, copy=False).tobytes()


def _finite(spec: TensorSpec, array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Refusal(400, f"input {spec.name!r} holds a value that is not finite in {spec.datatype}.")
    return array


def _flatten(spec: TensorSpec, values: list[Any]) -> tuple[tuple[int, ...], list[Any]]:
    """Shape and values of nested lists, checked level by level: numpy would first make room for the widest string."""
    shape = [len(values)]
    while values and type(values[0]) is list:
        if set(map(type, values)) != {list} or len(set(map(len, values))) != 1:
            raise Refusal(400, f"input {spec.name!r} has lists of several lengths, or lists beside values.")
        if len(shape) > len(spec.shape):
            raise Refusal(400, f"input {spec.name!r} has data nested deeper than its shape {list(spec.shape)}.")
        shape.append(len(values[0]))
        values = list(chain.from_iterable(values))
    return tuple(shape), values
