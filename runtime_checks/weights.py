"""Decoding constants of the file: weights in every storage, scales, zero points, shapes.

A weight reaches its DequantizeLinear as int8, as INT4 or INT2 through a Cast, or as packed codes through a table
(Cast -> Gather -> Reshape, with a Slice where the last code is not full), whose rows hold weights, or positions among
levels of the layer's own (a second Cast -> Gather). Other tools clip int8 weights to fewer bits, transpose them, or
store floats that the file quantises. onnxruntime folds those nodes when it loads the file; here they are evaluated
again from the bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from mecdeploy.runtime_checks.errors import CheckError

Array = NDArray[np.generic]

_PACKED_BITS: dict[int, int] = {TensorProto.INT4: 4, getattr(TensorProto, "INT2", -1): 2}
_OTHER_PACKED_BITS: dict[int, int] = {
    TensorProto.UINT4: 4,
    getattr(TensorProto, "UINT2", -1): 2,
    getattr(TensorProto, "FLOAT4E2M1", -1): 4,
}
"""Of other tools; numpy_helper unpacks them."""

_CAST_TYPES: dict[int, type[np.generic]] = {
    TensorProto.INT8: np.int8,
    TensorProto.UINT8: np.uint8,
    TensorProto.INT32: np.int32,
    TensorProto.INT64: np.int64,
}


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A value known from the file alone, and how its bytes lie there.

    bits: information per element as the storage allows it: 8, 4, 2, or log2(rows) / columns of a table, rounded up.
    per_code, code_bytes: elements in one stored code, and its size. stored_bytes: of the codes, tables left out.
    source: initialiser the codes come from. tables: those that they are read through. clipped: whether a Clip was.
    """

    value: Array
    storage: str
    bits: int
    per_code: int
    code_bytes: int
    stored_bytes: int
    source: str
    tables: tuple[str, ...] = ()
    clipped: bool = False


def unpack_signed(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int8]:
    """Two's complement fields of `bits` bits, lowest bits of each byte first, the first `count` of them."""
    fields = (np.arange(256)[:, None] >> np.arange(0, 8, bits)) & (2**bits - 1)
    table = np.where(fields < 2 ** (bits - 1), fields, fields - 2**bits).astype(np.int8)  # every byte's fields
    values: NDArray[np.int8] = np.take(table, packed, axis=0).reshape(-1)[:count]
    return values


class Constants:
    """Every constant of a graph by name; nodes between initialisers and their users are evaluated on demand."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._producers = {name: node for node in graph.node for name in node.output}
        self._cache: dict[str, Constant | None] = {}

    def get(self, name: str) -> Constant | None:
        """The constant called `name`, or None when it depends on the graph's input or cannot fold."""
        if name not in self._cache:
            self._cache[name] = self._evaluate(name)
        return self._cache[name]

    def _evaluate(self, name: str) -> Constant | None:
        if name in self._initializers:
            return _decode(self._initializers[name])
        node = self._producers.get(name)
        if node is None or node.op_type not in _FOLDS:
            return None
        inputs = [self.get(item) for item in node.input if item]
        known = [item for item in inputs if item is not None]
        if len(known) != len(inputs):
            return None
        try:
            return _FOLDS[node.op_type](node, known)
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise CheckError(
                f"node {node.name!r} ({node.op_type}): cannot be evaluated from the file ({error}). "
                "Export the run again."
            ) from None


def _decode(tensor: TensorProto) -> Constant:
    count = math.prod(tensor.dims)
    bits = _PACKED_BITS.get(tensor.data_type)
    try:
        if bits is not None and tensor.HasField("raw_data"):
            packed = np.frombuffer(tensor.raw_data, np.uint8)
            if packed.size != -(-count * bits // 8):
                raise ValueError(f"{packed.size} bytes for {count} values of {bits} bits")
            value: Array = unpack_signed(packed, bits, count).reshape(tuple(tensor.dims))
        else:
            value = numpy_helper.to_array(tensor)
            value = value.astype(np.int8) if bits is not None else value
    except (ValueError, TypeError) as error:
        raise CheckError(f"initialiser {tensor.name!r} cannot be decoded ({error}). Export the run again.") from None
    width = bits or _OTHER_PACKED_BITS.get(tensor.data_type) or 8 * value.dtype.itemsize
    return Constant(
        value=value,
        storage=f"int{bits}" if bits is not None else str(value.dtype),
        bits=width,
        per_code=max(1, 8 // width),
        code_bytes=max(1, width // 8),
        stored_bytes=len(tensor.raw_data) if tensor.HasField("raw_data") else tensor.ByteSize(),
        source=tensor.name,
    )


def _attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default


def _constant(node: onnx.NodeProto, inputs: list[Constant]) -> Constant:
    (attribute,) = node.attribute
    if attribute.name != "value":
        raise ValueError(f"attribute {attribute.name}")
    return replace(_decode(attribute.t), source=node.output[0])


def _cast(node: onnx.NodeProto, inputs: list[Constant]) -> Constant:
    target = _attribute(node, "to")
    if not isinstance(target, int) or target not in _CAST_TYPES:
        raise ValueError(f"cast to type {target}")
    return replace(inputs[0], value=inputs[0].value.astype(_CAST_TYPES[target]))


def _clip(node: onnx.NodeProto, inputs: list[Constant]) -> Constant:
    """Bounds may be left out, each by an empty name."""
    data, *given = (item.value for item in inputs)
    bounds = iter(given)
    low, high = (next(bounds) if index < len(node.input) and node.input[index] else None for index in (1, 2))
    return replace(inputs[0], value=np.clip(data, low, high), clipped=True)


def _transpose(node: onnx.NodeProto, inputs: list[Constant]) -> Constant:
    order = _attribute(node, "perm")
    return replace(inputs[0], value=np.transpose(inputs[0].value, order if isinstance(order, list) else None))


def _identity(node: onnx.NodeProto, inputs: list[Constant]) -> Constant:
    return inputs[0]


def _quantize(node: onnx.NodeProto, inputs: list[Constant]) -> Constant:
    """Float weights that the file itself quantises: clamp(round(x / scale) + zero_point), half to even."""
    data, scale = (np.asarray(item.value, np.float32) for item in inputs[:2])
    zero_point = inputs[2].value if len(inputs) > 2 else np.zeros((), np.uint8)
    if zero_point.dtype not in (np.int8, np.uint8) or scale.size != 1 and scale.ndim != 1:
        raise ValueError(f"quantized to {zero_point.dtype} with scales of shape {list(scale.shape)}")
    axis = _attribute(node, "axis", 1)
    assert isinstance(axis, int)
    along = [1] * data.ndim
    if scale.size > 1:
        along[axis] = -1
    zero = zero_point.astype(np.float32).reshape(along if zero_point.size > 1 else [])
    low, high = (-128, 127) if zero_point.dtype == np.int8 else (0, 255)
    codes = np.clip(np.rint(data / scale.reshape(along)) + zero, low, high)
    return replace(inputs[0], value=codes.astype(zero_point.dtype))


def _reshape(node: onnx.NodeProto, inputs: list[Constant]) -> Constant:
    data, shape = inputs[0].value, inputs[1].value
    sizes = [data.shape[i] if size == 0 else int(size) for i, size in enumerate(shape.tolist())]
    return replace(inputs[0], value=data.reshape(sizes))


def _slice(node: onnx.NodeProto, inputs: list[Constant]) -> Constant:
    starts, ends, *optional = [item.value.tolist() for item in inputs[1:]]
    axes = optional[0] if optional else range(len(starts))
    steps = optional[1] if len(optional) > 1 else [1] * len(starts)
    chosen = [slice(None)] * inputs[0].value.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        chosen[axis] = slice(start, end, step)
    return replace(inputs[0], value=inputs[0].value[tuple(chosen)])


def _look_up(node: onnx.NodeProto, inputs: list[Constant]) -> Constant:
    """Codes through a table [rows, weights per code], or positions through levels [n]; codes are what is stored."""
    table, codes = inputs[0].value, inputs[1]
    if _attribute(node, "axis", 0) != 0 or codes.value.min(initial=0) < 0 or codes.value.max(initial=0) >= len(table):
        raise ValueError(f"{codes.source!r} does not index a table of {len(table)} rows")
    found = replace(codes, value=table[codes.value.astype(np.int64)], tables=(*codes.tables, inputs[0].source))
    if table.ndim == 1:
        return found
    rows, columns = table.shape
    return replace(found, storage="table", bits=math.ceil(math.log2(rows) / columns), per_code=columns)


_FOLDS = {
    "Constant": _constant,
    "Cast": _cast,
    "Reshape": _reshape,
    "Slice": _slice,
    "Gather": _look_up,
    "Clip": _clip,
    "Transpose": _transpose,
    "Identity": _identity,
    "QuantizeLinear": _quantize,
}
