"""Packed weights: how each storage becomes an int8 tensor inside the model.

Every chain here has constant inputs, so onnxruntime folds it once, at load, and the convolution reads plain int8. INT4
read directly by DequantizeLinear is not folded: it runs a float convolution, slower than fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from mecdeploy.export.emission.builder import INT8, INT32, GraphBuilder
from mecdeploy.export.graph import Weight
from mecdeploy.export.packing import base_of, lookup_table, pack, pack_rows, pack_vectors, values_per_row


def emit_weight(builder: GraphBuilder, unit: str, weight: Weight) -> str:
    """Write `<unit>/weight`, int8 of the weight's own shape, and `<unit>/weight/real` from it; return the latter.

    The zero points are explicit because onnxruntime makes no QGemm without them, and each unit's own because its
    rewrite for CPUs without VNNI (session.x64quantprecision) refuses a model in which two 8-bit layers share them.
    """
    codes = STORAGES[weight.storage](builder, f"{unit}/weight", weight)
    scale = builder.initializer(f"{unit}/weight/scale", weight.scale)
    zero_point = builder.initializer(f"{unit}/weight/zero_point", np.zeros(weight.scale.size, np.int8))
    return builder.node("DequantizeLinear", [codes, scale, zero_point], f"{unit}/weight/real", axis=0)


def _emit_int8(builder: GraphBuilder, name: str, weight: Weight) -> str:
    return builder.initializer(name, weight.codes)


def _emit_int4(builder: GraphBuilder, name: str, weight: Weight) -> str:
    packed = pack(weight.codes, 4)
    narrow = builder.packed_initializer(f"{name}/packed", packed, TensorProto.INT4, weight.codes.shape)
    return builder.node("Cast", [narrow], name, to=INT8)


def _emit_int2(builder: GraphBuilder, name: str, weight: Weight) -> str:
    packed = pack(weight.codes, 2)
    narrow = builder.packed_initializer(f"{name}/packed", packed, TensorProto.INT2, weight.codes.shape)
    return builder.node("Cast", [narrow], name, to=INT8)


def _emit_table(builder: GraphBuilder, name: str, weight: Weight) -> str:
    """Row indices -> Cast -> Gather(table) -> Reshape; a Slice drops the padding of a count that fills no last row.

    Levels at even distances are a grid that layers share, and so is the table that holds them. Other levels are a
    layer's own: the table's rows are positions, through which a second Gather reads them. A codebook is a table itself.
    """
    bits, levels = weight.packed_bits, weight.packed_levels
    packed: NDArray[np.uint8] | NDArray[np.uint16]
    if levels is not None and levels.ndim == 2:
        packed, table, per_row = pack_vectors(weight.codes, levels), builder.initializer(f"{name}/vectors", levels), 1
    else:
        packed, per_row = pack_rows(weight.codes, bits, levels), values_per_row(bits, levels)
        table = _shared_table(builder, bits, levels)
    index = builder.node("Cast", [builder.initializer(f"{name}/packed", packed)], f"{name}/index", to=INT32)
    codes = builder.node("Gather", [table, index], f"{name}/rows", axis=0)
    if _are_own(levels):
        position = builder.node("Cast", [codes], f"{name}/position", to=INT32)
        own = builder.initializer(f"{name}/levels", levels)
        codes = builder.node("Gather", [own, position], f"{name}/values", axis=0)
    if weight.codes.size % per_row:
        flat = builder.shared("shape/flat", np.array([-1], np.int64))
        codes = builder.node("Reshape", [codes, flat], f"{name}/flat")
        start = builder.shared("slice/start", np.array([0], np.int64))
        end = builder.initializer(f"{name}/count", np.array([weight.codes.size], np.int64))
        codes = builder.node("Slice", [codes, start, end], f"{name}/codes")
    shape = builder.initializer(f"{name}/shape", np.array(weight.codes.shape, np.int64))
    return builder.node("Reshape", [codes, shape], name)


def _shared_table(builder: GraphBuilder, bits: int, levels: NDArray[np.int8] | None) -> str:
    if levels is None:
        return builder.shared(f"table/{bits}bit", lookup_table(bits))
    if _are_own(levels):
        base = base_of(bits, levels)
        return builder.shared(f"table/positions/{base}", lookup_table(bits, np.arange(base, dtype=np.int8)))
    return builder.shared(f"table/{bits}bit/{levels[0]}..{levels[-1]}/{levels.size}", lookup_table(bits, levels))


def _are_own(levels: NDArray[np.int8] | None) -> TypeGuard[NDArray[np.int8]]:
    """Whether levels, not of vectors, lie at uneven distances."""
    return levels is not None and levels.ndim == 1 and np.unique(np.diff(levels.astype(np.int16))).size > 1


STORAGES: MappingProxyType[str, Callable[[GraphBuilder, str, Weight], str]] = MappingProxyType(
    {"int8": _emit_int8, "int4": _emit_int4, "int2": _emit_int2, "table": _emit_table}
)
