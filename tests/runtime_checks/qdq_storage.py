"""Weights as they lie in hand-made files: int8, packed INT4 and INT2, and codes through a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto, helper

if TYPE_CHECKING:
    from qdq_models import Builder

STORAGES = ("int8", "int4", "int2", "table2", "table3", "table4")
STORED_BITS = {"int8": 8, "int4": 4, "int2": 2, "table2": 2, "table3": 3, "table4": 4}


def store(build: Builder, name: str, codes: np.ndarray, storage: str) -> None:
    """Write int8 `codes` under `name` in one of the storages."""
    flat = codes.reshape(-1)
    if storage == "int8":
        build.constant(name, codes)
        return
    if storage in ("int4", "int2"):
        bits = STORED_BITS[storage]
        kind = TensorProto.INT4 if storage == "int4" else TensorProto.INT2
        build.has_int2 |= storage == "int2"
        data = _packed_bytes(flat & (2**bits - 1), bits)
        build.initializers[f"{name}/packed"] = helper.make_tensor(f"{name}/packed", kind, codes.shape, data, raw=True)
        build.node("Cast", [f"{name}/packed"], name, to=TensorProto.INT8)
        return
    bits = STORED_BITS[storage]
    per_code = 5 if bits == 3 else 8 // bits
    offset = 2 ** (bits - 1)
    padded = np.zeros(-(-flat.size // per_code) * per_code, np.int64)
    padded[: flat.size] = flat.astype(np.int64) + offset
    fields = padded.reshape(-1, per_code)
    packed = (fields << (bits * np.arange(per_code))).sum(axis=1)
    build.constant(f"{name}/packed", packed, np.uint16 if bits == 3 else np.uint8)
    rows = np.arange(2 ** (bits * per_code))
    table = ((rows[:, None] >> (bits * np.arange(per_code))) & (2**bits - 1)) - offset
    build.constant(f"table{bits}", table, np.int8)
    build.node("Cast", [f"{name}/packed"], f"{name}/index", to=TensorProto.INT32)
    build.node("Gather", [f"table{bits}", f"{name}/index"], f"{name}/rows", axis=0)
    source = f"{name}/rows"
    if padded.size != flat.size:
        build.node("Reshape", [source, build.constant("shape/flat", [-1], np.int64)], f"{name}/flat")
        limits = [build.constant("slice/start", [0], np.int64)]
        limits.append(build.constant(f"{name}/count", [flat.size], np.int64))
        source = build.node("Slice", [f"{name}/flat", *limits], f"{name}/codes")
    build.node("Reshape", [source, build.constant(f"{name}/shape", codes.shape, np.int64)], name)


def _packed_bytes(fields: np.ndarray, bits: int) -> bytes:
    """Fields of `bits` bits, lowest first in each byte."""
    per_byte = 8 // bits
    padded = np.zeros(-(-fields.size // per_byte) * per_byte, np.uint8)
    padded[: fields.size] = fields.astype(np.uint8)
    packed = (padded.reshape(-1, per_byte).astype(np.int64) << (bits * np.arange(per_byte))).sum(axis=1)
    return packed.astype(np.uint8).tobytes()
