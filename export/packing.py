"""Low-bit integers in bytes, and the lookup tables that turn the bytes back into int8 inside a model.

Two layouts. `pack` is ONNX's own for INT4 and INT2: two's complement, the first value in the lowest bits of a byte.
`pack_rows` is the portable one: offset-binary codes (value + 2^(bits-1)), several to an unsigned integer, the first
in its lowest bits; the integer is the row of a table that holds the values themselves. For 2 and 4 bits a row index is
a byte and the byte differs from ONNX's only by the sign bits; 3 bits do not divide a byte, so five codes share 15 bits
of a uint16 (3.2 bits a weight and a table of 160 KiB, once a file: smaller than 4 bits from 1.6 million weights on).
Counts that do not fill the last byte are padded, with the value 0; unpacking takes the count and drops the padding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecdeploy.export.errors import ExportError

VALUES_PER_ROW = {2: 4, 3: 5, 4: 2}
"""Portable layout: how many values one row index holds, by bits."""


def pack(values: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Pack signed integers as ONNX INT4 or INT2 raw data.

    values: int8, any shape, read in C order, in -2^(bits-1)..2^(bits-1)-1. bits: 2 or 4.
    Returns uint8 [ceil(n * bits / 8)]. Raises ExportError for other widths and for values out of range.
    """
    _require_whole_bits(bits)
    _require_range(values, bits)
    codes = values.reshape(-1).view(np.uint8) & np.uint8((1 << bits) - 1)
    return _join(codes, bits, 8 // bits, np.dtype(np.uint8), padding=0)


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int8]:
    """Invert `pack`: uint8 [ceil(count * bits / 8)] -> int8 [count]."""
    _require_whole_bits(bits)
    codes = _split(packed, bits, 8 // bits)[:count]
    sign = 1 << (bits - 1)
    return (codes ^ np.uint8(sign)).view(np.int8) - np.int8(sign)


def pack_rows(values: NDArray[np.int8], bits: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Pack signed integers as row indices of `lookup_table(bits)`.

    values: int8, any shape, read in C order, in -2^(bits-1)..2^(bits-1)-1. bits: 2, 3 or 4.
    Returns [ceil(n / VALUES_PER_ROW[bits])], uint8, or uint16 for 3 bits.
    """
    _require_table_bits(bits)
    _require_range(values, bits)
    codes = (values.reshape(-1) + np.int8(1 << (bits - 1))).view(np.uint8)
    word = np.dtype(np.uint16 if bits * VALUES_PER_ROW[bits] > 8 else np.uint8)
    return _join(codes, bits, VALUES_PER_ROW[bits], word, padding=1 << (bits - 1))


def unpack_rows(rows: NDArray[np.uint8] | NDArray[np.uint16], bits: int, count: int) -> NDArray[np.int8]:
    """Invert `pack_rows` by the lookup a model does: int8 [count]."""
    return lookup_table(bits)[rows].reshape(-1)[:count]


def lookup_table(bits: int) -> NDArray[np.int8]:
    """Every row index's values: int8 [256, 8 / bits] for 2 and 4 bits, [32768, 5] for 3."""
    _require_table_bits(bits)
    per_row = VALUES_PER_ROW[bits]
    rows = np.arange(1 << (bits * per_row), dtype=np.uint16)
    return _split(rows, bits, per_row).view(np.int8).reshape(-1, per_row) - np.int8(1 << (bits - 1))


def _join(codes: NDArray[np.uint8], bits: int, per_word: int, word: np.dtype[Any], *, padding: int) -> NDArray[Any]:
    """Put `per_word` codes of `bits` bits into each word, the first lowest."""
    missing = -codes.size % per_word
    if missing:
        codes = np.concatenate([codes, np.full(missing, padding, np.uint8)])
    columns = codes.reshape(-1, per_word)
    words = columns[:, 0].astype(word)
    for position in range(1, per_word):
        words |= columns[:, position].astype(word) << (position * bits)
    return words


def _split(words: NDArray[Any], bits: int, per_word: int) -> NDArray[np.uint8]:
    """Invert `_join`, padding included: uint8 [len(words) * per_word]."""
    shifts = (np.arange(per_word) * bits).astype(words.dtype)
    fields = ((words[:, None] >> shifts) & ((1 << bits) - 1)).astype(np.uint8)
    return np.ascontiguousarray(fields).reshape(-1)


def _require_whole_bits(bits: int) -> None:
    if bits not in (2, 4):
        raise ExportError(f"cannot pack {bits}-bit integers into whole bytes; use 2 or 4 bits, or pack_rows for 3.")


def _require_table_bits(bits: int) -> None:
    if bits not in VALUES_PER_ROW:
        raise ExportError(f"no lookup table for {bits}-bit integers; use 2, 3 or 4 bits, or store 8 bits as int8.")


def _require_range(values: NDArray[np.int8], bits: int) -> None:
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if values.size and (int(values.min()) < low or int(values.max()) > high):
        raise ExportError(
            f"cannot pack values {int(values.min())}..{int(values.max())} into {bits} bits, which hold {low}..{high}."
        )
