"""Packing against the layouts written out by hand, and round trips over every width and count."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from mecdeploy.export.errors import ExportError
from mecdeploy.export.packing import lookup_table, pack, pack_rows, unpack, unpack_rows


def values_of(bits: int, max_size: int = 70) -> st.SearchStrategy[np.ndarray]:
    half = 1 << (bits - 1)
    return st.lists(st.integers(-half, half - 1), max_size=max_size).map(lambda items: np.array(items, np.int8))


@pytest.mark.parametrize("bits", [2, 4])
def test_pack_round_trips(bits: int) -> None:
    @given(values_of(bits))
    def round_trip(values: np.ndarray) -> None:
        packed = pack(values, bits)
        assert packed.dtype == np.uint8
        assert packed.size == -(-values.size * bits // 8)
        unpacked = unpack(packed, bits, values.size)
        assert unpacked.dtype == np.int8
        np.testing.assert_array_equal(unpacked, values)

    round_trip()


@pytest.mark.parametrize(("bits", "per_row", "dtype"), [(2, 4, np.uint8), (3, 5, np.uint16), (4, 2, np.uint8)])
def test_pack_rows_round_trips(bits: int, per_row: int, dtype: type) -> None:
    @given(values_of(bits))
    def round_trip(values: np.ndarray) -> None:
        rows = pack_rows(values, bits)
        assert rows.dtype == dtype
        assert rows.size == -(-values.size // per_row)
        np.testing.assert_array_equal(unpack_rows(rows, bits, values.size), values)

    round_trip()


def test_the_first_value_lies_in_the_lowest_bits() -> None:
    assert pack(np.array([1, -8, 7], np.int8), 4).tolist() == [0x81, 0x07]
    assert pack(np.array([1, -2, 0, -1, 1], np.int8), 2).tolist() == [0b11_00_10_01, 0b01]
    assert pack_rows(np.array([1, -8, 7], np.int8), 4).tolist() == [0x09, 0x8F]
    assert pack_rows(np.array([1, -2, 0, -1, 1], np.int8), 2).tolist() == [0b01_10_00_11, 0b10_10_10_11]
    five = [-4, -3, 0, 3, -1]
    assert pack_rows(np.array([*five, 3], np.int8), 3).tolist() == [0b011_111_100_001_000, 0b100_100_100_100_111]


@pytest.mark.parametrize(("bits", "element"), [(2, onnx.TensorProto.INT2), (4, onnx.TensorProto.INT4)])
def test_onnx_reads_what_pack_writes(bits: int, element: int) -> None:
    half = 1 << (bits - 1)
    values = np.arange(-half, half, dtype=np.int8).repeat(3)[:-1]
    tensor = onnx.TensorProto(data_type=element, dims=values.shape, raw_data=pack(values, bits).tobytes())
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), values)


@pytest.mark.parametrize("bits", [2, 4])
def test_rows_differ_from_onnx_bytes_by_the_sign_bits(bits: int) -> None:
    values = np.random.default_rng(0).integers(-(1 << (bits - 1)), 1 << (bits - 1), 64).astype(np.int8)
    signs = {2: 0b10101010, 4: 0b10001000}[bits]
    np.testing.assert_array_equal(pack_rows(values, bits), pack(values, bits) ^ signs)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_table_holds_every_row_digit_by_digit(bits: int) -> None:
    table = lookup_table(bits)
    assert table.dtype == np.int8
    assert table.shape == {2: (256, 4), 3: (32768, 5), 4: (256, 2)}[bits]
    base = 1 << bits
    for row in (0, 1, base - 1, base, 201, len(table) - 1):
        digits, rest = [], row
        for _ in range(table.shape[1]):
            rest, digit = divmod(rest, base)
            digits.append(digit - base // 2)
        assert table[row].tolist() == digits


def test_multi_dimensional_and_strided_values_are_read_in_c_order() -> None:
    values = np.arange(-8, 8, dtype=np.int8).reshape(4, 4).T
    np.testing.assert_array_equal(unpack(pack(values, 4), 4, 16), values.reshape(-1))
    np.testing.assert_array_equal(unpack_rows(pack_rows(values, 4), 4, 16), values.reshape(-1))


@pytest.mark.parametrize("packer", [pack, pack_rows])
@pytest.mark.parametrize("value", [-9, 8])
def test_values_out_of_range_are_refused(packer: object, value: int) -> None:
    with pytest.raises(ExportError, match=rf"cannot pack values .*{value}.* into 4 bits, which hold -8\.\.7"):
        packer(np.array([0, value], np.int8), 4)  # type: ignore[operator]


def test_widths_without_a_layout_are_refused() -> None:
    none = np.zeros(0, np.int8)
    with pytest.raises(ExportError, match="cannot pack 3-bit integers into whole bytes; use 2 or 4 bits, or pack_rows"):
        pack(none, 3)
    with pytest.raises(ExportError, match="cannot pack 8-bit integers"):
        unpack(np.zeros(0, np.uint8), 8, 0)
    with pytest.raises(ExportError, match="no lookup table for 8-bit integers; use 2, 3 or 4 bits"):
        pack_rows(none, 8)
    with pytest.raises(ExportError, match="no lookup table for 5-bit"):
        lookup_table(5)
