"""Low-bit integers in bytes, and the lookup tables that turn the bytes back into int8 inside a model.

Two layouts. `pack` is ONNX's own for INT4 and INT2: two's complement, the first value in the lowest bits of a byte.
`pack_rows` is the portable one: digits, several to an unsigned integer, the first its lowest; the integer is the row of
a table that holds the values themselves. Of the plain range a digit is value + 2^(bits-1), of other levels it is the
level's position, and the kernels being int8 whatever the storage, levels may be any int8. For 1, 2 and 4 bits a row
index is a byte, and for 2 and 4 bits of the plain range it differs from ONNX's only by the sign bits; 3 bits do not
divide a byte, so five digits share 15 bits of a uint16 (3.2 bits a weight and a table of 160 KiB, once a file: smaller
than 4 bits from 1.6 million weights on); of three levels a byte holds five, in base 3 (1.6 bits a weight).
`pack_vectors` writes one byte for several values at once, the position of a vector in a codebook.
Counts that do not fill the last byte are padded, with the value 0 or the first level; unpacking takes the count and
drops the padding.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mecdeploy.export.errors import ExportError

DIGITS_PER_ROW = {2: 8, 3: 5, 4: 4, 8: 5, 16: 2}
"""Portable layout: how many digits one row index holds, by their base."""

Levels: TypeAlias = "NDArray[np.int8] | None"
"""int8 [n], ascending: what values can be; None for the plain range -2^(bits-1)..2^(bits-1)-1."""


def plain_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed integer of so many bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def pack(values: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Pack signed integers as ONNX INT4 or INT2 raw data.

    values: int8, any shape, read in C order, in -2^(bits-1)..2^(bits-1)-1. bits: 2 or 4.
    Returns uint8 [ceil(n * bits / 8)]. Raises ExportError for other widths and for values out of range.
    """
    _require_whole_bits(bits)
    _require_range(values, bits)
    codes = values.reshape(-1).view(np.uint8) & np.uint8((1 << bits) - 1)
    return _join(codes, 1 << bits, 8 // bits, padding=0).astype(np.uint8)


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int8]:
    """Invert `pack`: uint8 [ceil(count * bits / 8)] -> int8 [count]."""
    _require_whole_bits(bits)
    codes = _split(packed, 1 << bits, 8 // bits)[:count]
    sign = 1 << (bits - 1)
    return (codes ^ np.uint8(sign)).view(np.int8) - np.int8(sign)


def base_of(bits: int, levels: Levels) -> int:
    """Base of the digits: 2^bits, or 3 for three levels, of which a byte holds more so."""
    if levels is None:
        _require_table_bits(bits)
    elif bits == 2 and levels.size == 3:
        return 3
    elif bits not in (1, 2, 3, 4) or levels.size > 1 << bits:
        raise ExportError(f"no lookup table of {bits} bits for {levels.size} levels; use 1 to 4 bits that hold them.")
    return 1 << bits


def values_per_row(bits: int, levels: Levels = None) -> int:
    """How many values one row index holds."""
    return DIGITS_PER_ROW[base_of(bits, levels)]


def pack_rows(values: NDArray[np.int8], bits: int, levels: Levels = None) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Pack signed integers as row indices of `lookup_table(bits, levels)`.

    values: int8, any shape, read in C order, each one of the levels. bits: 2, 3 or 4; with levels also 1.
    Returns [ceil(n / values_per_row(bits, levels))], uint8, or uint16 for 3 bits.
    """
    base = base_of(bits, levels)
    if levels is None:
        _require_range(values, bits)
        digits = (values.reshape(-1) + np.int8(base // 2)).view(np.uint8)
    else:
        _require_levels(values, levels)
        digits = np.searchsorted(levels, values.reshape(-1)).astype(np.uint8)
    per_row = DIGITS_PER_ROW[base]
    rows = _join(digits, base, per_row, padding=base // 2 if levels is None else 0)
    return rows if base**per_row > 256 else rows.astype(np.uint8)


def unpack_rows(
    rows: NDArray[np.uint8] | NDArray[np.uint16], bits: int, count: int, levels: Levels = None
) -> NDArray[np.int8]:
    """Invert `pack_rows` by the lookup a model does: int8 [count]."""
    return lookup_table(bits, levels)[rows].reshape(-1)[:count]


def lookup_table(bits: int, levels: Levels = None) -> NDArray[np.int8]:
    """Every row index's values, int8: [256, 8 / bits] for 1, 2 and 4 bits, [32768, 5] for 3, [243, 5] of 3 levels.

    Digits that no level has, where there are fewer than 2^bits, stand for the last one.
    """
    base = base_of(bits, levels)
    per_row = DIGITS_PER_ROW[base]
    digits = _split(np.arange(base**per_row, dtype=np.uint16), base, per_row).reshape(-1, per_row)
    if levels is None:
        return digits.view(np.int8) - np.int8(base // 2)
    return levels[np.minimum(digits, levels.size - 1)]


def pack_vectors(values: NDArray[np.int8], vectors: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack signed integers as positions in a codebook.

    values: int8, any shape, read in C order; each `width` successive ones are a row of vectors, int8 [n, width], n at
    most 256. Returns uint8 [len(values) / width]; `vectors[packed]` is the inverse.
    """
    width = vectors.shape[1]
    if values.size % width:
        raise ExportError(f"cannot pack {values.size} values as vectors of {width}; they do not divide.")
    as_one = np.dtype((np.void, width))
    table, searched = (np.ascontiguousarray(a).reshape(-1, width).view(as_one).reshape(-1) for a in (vectors, values))
    found, positions = np.unique(table, return_index=True)
    place = np.searchsorted(found, searched).clip(max=found.size - 1)
    if not np.array_equal(found[place], searched):
        raise ExportError(f"cannot pack values that are no vectors of their codebook of {len(vectors)}.")
    packed: NDArray[np.uint8] = positions[place].astype(np.uint8)
    return packed


def _join(digits: NDArray[np.uint8], base: int, per_word: int, *, padding: int) -> NDArray[np.uint16]:
    """Make a number of each `per_word` digits, the first lowest."""
    missing = -digits.size % per_word
    if missing:
        digits = np.concatenate([digits, np.full(missing, padding, np.uint8)])
    columns = digits.reshape(-1, per_word)
    words = columns[:, 0].astype(np.uint16)
    for position in range(1, per_word):
        words += columns[:, position].astype(np.uint16) * np.uint16(base**position)
    return words


def _split(words: NDArray[Any], base: int, per_word: int) -> NDArray[np.uint8]:
    """Invert `_join`, padding included: uint8 [len(words) * per_word]."""
    powers = base ** np.arange(per_word, dtype=np.uint16)
    digits = (words.astype(np.uint16)[:, None] // powers) % np.uint16(base)
    return digits.astype(np.uint8).reshape(-1)


def _require_whole_bits(bits: int) -> None:
    if bits not in (2, 4):
        raise ExportError(f"cannot pack {bits}-bit integers into whole bytes; use 2 or 4 bits, or pack_rows for 3.")


def _require_table_bits(bits: int) -> None:
    if bits not in (2, 3, 4):
        raise ExportError(f"no lookup table for {bits}-bit integers; use 2, 3 or 4 bits, or store 8 bits as int8.")


def _require_range(values: NDArray[np.int8], bits: int) -> None:
    low, high = plain_range(bits)
    if values.size and (int(values.min()) < low or int(values.max()) > high):
        raise ExportError(
            f"cannot pack values {int(values.min())}..{int(values.max())} into {bits} bits, which hold {low}..{high}."
        )


def _require_levels(values: NDArray[np.int8], levels: NDArray[np.int8]) -> None:
    others = np.setdiff1d(values, levels)
    if others.size:
        raise ExportError(f"cannot pack the value {others[0]}, which is none of the levels {levels.tolist()}.")
