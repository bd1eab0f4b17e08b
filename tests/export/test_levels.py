"""Weights on other levels than the plain range: what lies in the file, and what onnxruntime computes from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from handmade_graphs import depthwise_graph, odd_graph, pixels_for, residual_graph
from integer_witness import evaluate
from level_graphs import GRIDS, Grid, on_grid
from onnx_sessions import expose_units, kernels, metadata_of, optimized, run

from mecdeploy.export import ExportConfig, ExportError, export_model
from mecdeploy.export.graph import Conv, Gemm, IntegerGraph, Weight
from mecdeploy.export.packing import lookup_table, pack_rows, pack_vectors, unpack_rows, values_per_row
from mecdeploy.export.validation import validate_graph
from mecdeploy.runtime_checks import inspect_structure

TARGETS = ("onnxruntime", "portable")
GRAPHS = {"residual": residual_graph, "depthwise": depthwise_graph, "odd": odd_graph}
CASES = [(name, grid) for name in GRAPHS for grid in GRIDS if (name, grid) != ("odd", "codebook")]
"""None of the odd graph's filters divides into fours."""


def export(graph: IntegerGraph, **options: object) -> bytes:
    return export_model(graph, ExportConfig(**options), {})  # type: ignore[arg-type]


def leveled(graph: IntegerGraph) -> dict[str, Weight]:
    weights = {node.name: node.weight for node in graph.nodes if isinstance(node, Conv | Gemm)}
    return {name: weight for name, weight in weights.items() if weight.levels is not None}


def stored(data: bytes, name: str) -> np.ndarray:
    (tensor,) = [tensor for tensor in onnx.load_from_string(data).graph.initializer if tensor.name == name]
    return onnx.numpy_helper.to_array(tensor)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS.values() if grid.levels], ids=lambda grid: str(grid.levels))
def test_rows_are_digits_of_the_levels_one_by_one(grid: Grid) -> None:
    levels = np.array(grid.levels, np.int8)
    values = np.random.default_rng(0).choice(levels, 37)
    base = 3 if len(levels) == 3 else 2**grid.bits
    (per_row, size) = grid.per_code
    expected = []
    for start in range(0, len(values), per_row):
        row = 0
        for place, value in enumerate(values[start : start + per_row].tolist()):
            row += grid.levels.index(value) * base**place  # type: ignore[union-attr]
        expected.append(row)
    rows = pack_rows(values, grid.bits, levels)
    assert rows.tolist() == expected and rows.dtype.itemsize == size and values_per_row(grid.bits, levels) == per_row
    np.testing.assert_array_equal(unpack_rows(rows, grid.bits, len(values), levels), values)
    assert lookup_table(grid.bits, levels).shape == (base**per_row, per_row)


def test_a_byte_of_three_levels_holds_five() -> None:
    ternary = np.array([-1, 0, 1], np.int8)
    assert pack_rows(np.array([1, -1, 0, 0, 1, 1], np.int8), 2, ternary).tolist() == [2 + 0 + 9 + 27 + 162, 2]
    assert lookup_table(2, ternary)[242].tolist() == [1, 1, 1, 1, 1]


def test_vectors_are_their_place_in_the_codebook() -> None:
    vectors = np.array([[5, -7, 0, 127], [-127, 1, 1, 1], [0, 0, 0, 0], [5, -7, 0, 126]], np.int8)
    packed = pack_vectors(vectors[[3, 0, 0, 2, 1]].reshape(1, 5, 2, 2), vectors)
    assert packed.dtype == np.uint8 and packed.tolist() == [3, 0, 0, 2, 1]


def test_values_that_are_no_levels_are_refused() -> None:
    levels = np.array([-3, -1, 1, 3], np.int8)
    with pytest.raises(ExportError, match=r"cannot pack the value 2, which is none of the levels \[-3, -1, 1, 3\]"):
        pack_rows(np.array([1, 2], np.int8), 2, levels)
    with pytest.raises(ExportError, match="no lookup table of 1 bits for 4 levels; use 1 to 4 bits that hold them"):
        lookup_table(1, levels)
    with pytest.raises(ExportError, match="cannot pack values that are no vectors of their codebook of 1"):
        pack_vectors(np.array([1, 2], np.int8), np.array([[1, 3]], np.int8))
    with pytest.raises(ExportError, match="cannot pack 3 values as vectors of 2"):
        pack_vectors(np.array([1, 3, 1], np.int8), np.array([[1, 3]], np.int8))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "grid"), CASES)
def test_every_unit_computes_the_witness_integers(name: str, grid: str, target: str) -> None:
    graph = on_grid(GRAPHS[name](4, 4), GRIDS[grid])
    assert leveled(graph)
    pixels = pixels_for(graph, 4)
    expected = evaluate(graph, pixels)
    for value, codes in run(expose_units(export(graph, target=target)), pixels).items():
        np.testing.assert_array_equal(codes, expected[value], err_msg=value)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "grid"), CASES)
def test_tables_fold_into_integer_kernels(name: str, grid: str, target: str, tmp_path: Path) -> None:
    graph = on_grid(GRAPHS[name](4, 4), GRIDS[grid])
    found = kernels(optimized(export(graph, target=target), tmp_path))
    assert not {"Gather", "Cast", "Conv", "Gemm", "FusedConv"} & set(found)
    assert found["QLinearConv"] == sum(isinstance(node, Conv) for node in graph.nodes)
    assert found["QGemm"] == sum(isinstance(node, Gemm) for node in graph.nodes)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_check_measures_what_is_promised(grid: str) -> None:
    graph = on_grid(residual_graph(4, 4), GRIDS[grid])
    report = inspect_structure(export(graph))
    assert report.failures == () and report.float_products == ()
    (per_code, size), levels = GRIDS[grid].per_code, GRIDS[grid].levels
    steps = set(np.diff(levels)) if levels else ()
    table = 160 if levels is None else len(levels) if len(steps) > 1 else 0
    rows = {row.unit: row for row in report.weights}
    for unit, weight in leveled(graph).items():
        codes = -(-weight.codes.size // per_code) * size
        assert (rows[unit].storage, rows[unit].bits) == ("table", GRIDS[grid].bits)
        assert (rows[unit].bytes, rows[unit].table_bytes) == (codes, table)
        assert rows[unit].bits_per_weight == 8 * (codes + table) / weight.codes.size


def test_layers_of_one_grid_share_a_table_and_learned_levels_share_the_positions() -> None:
    for grid, name in (("odd, 2 bits", "table/2bit/-3..3/4"), ("learned, 3 bits", "table/positions/8")):
        names = [
            tensor.name
            for tensor in onnx.load_from_string(export(on_grid(residual_graph(4, 4), GRIDS[grid]))).graph.initializer
        ]
        assert [found for found in names if found.startswith("table/")] == [name]
    assert stored(export(on_grid(residual_graph(4, 4), GRIDS["ternary"])), "table/2bit/-1..1/3").shape == (243, 5)


@pytest.mark.parametrize(
    ("grid", "bits", "packed", "storage"),
    [
        ("binary", 2, 2, "int2"),
        ("binary", 1, 1, "table"),
        ("ternary", 2, 2, "table"),
        ("ternary", 4, 4, "int4"),
        ("odd, 2 bits", 3, 3, "table"),
        ("odd, 2 bits", 4, 4, "int4"),
        ("odd, 4 bits", 8, 8, "int8"),
        ("learned, 2 bits", 4, 2, "table"),
        ("learned, 2 bits", 8, 8, "int8"),
        ("codebook", 4, 2, "table"),
        ("codebook", 8, 8, "int8"),
    ],
)
def test_a_wider_width_packs_plainly_what_it_holds(grid: str, bits: int, packed: int, storage: str) -> None:
    graph = on_grid(residual_graph(2, 4), GRIDS[grid])
    if grid == "codebook":
        graph = only_leveled(graph)
    pixels = pixels_for(graph, 2)
    for target in TARGETS:
        data = export(graph, bits=bits, target=target)
        promised = json.loads(metadata_of(data)["mecdeploy.weight_bits"])
        assert {promised[name] for name in leveled(graph)} == {packed}
        rows = {row.unit: row for row in inspect_structure(data).weights}
        if target == "onnxruntime":
            assert {rows[name].storage for name in leveled(graph)} == {storage}
        np.testing.assert_array_equal(run(data, pixels)["logits"], evaluate(graph, pixels)["logits"])


def only_leveled(graph: IntegerGraph) -> IntegerGraph:
    """The graph with its plain low-bit weights as 8-bit ones, so that nothing else limits the packed width."""
    return with_weights(graph, lambda weight: weight if weight.levels is not None else replace(weight, bits=8))


def with_weights(graph: IntegerGraph, change: object) -> IntegerGraph:
    nodes = tuple(
        replace(node, weight=change(node.weight)) if isinstance(node, Conv | Gemm) else node  # type: ignore[operator]
        for node in graph.nodes
    )
    return replace(graph, nodes=nodes)


def test_a_narrower_width_is_refused() -> None:
    with pytest.raises(ExportError, match="trained at 2 bits; packing them at 1 would round them"):
        export(on_grid(residual_graph(4, 4), GRIDS["ternary"]), bits=1)


DAMAGES = {
    "another code": ({"levels": np.array([-3, -1, 1], np.int8)}, r"has the weight code 3, which is none of its levels"),
    "too many": ({"bits": 1}, r"has 4 weight levels at 1 bits; 1 to 4 bits hold 2\^bits of them"),
    "unsorted": (
        {"levels": np.array([3, 1, -1, -3], np.int8)},
        r"has weight levels \[3, 1, -1, -3\]; they must ascend",
    ),
    "type": (
        {"levels": np.array([-3, -1, 1, 3])},
        r"has weight levels int64 \(4,\); int8 \(n,\) or \(n, width\) is due",
    ),
    "none": ({"levels": None, "bits": 1}, "has 1-bit weights without levels; say what the two are"),
    "storage": ({"packed_bits": 2, "storage": "int2"}, "stores weight levels as int2, which holds the plain range"),
    "wider": ({"levels": np.array([-9, -3, -1, 1, 3], np.int8), "bits": 3, "packed_bits": 4, "storage": "int4"}, ""),
    "vectors": ({"levels": np.ones((20, 4), np.int8)}, "has weight codes that are no vectors of its codebook of 20"),
    "one bit": ({"levels": np.ones((16, 4), np.int8)}, "has a codebook of 16 vectors of 4 at 2 bits"),
    "width": ({"levels": np.ones((64, 5), np.int8)}, "has 72 weights in a filter, which vectors of 5 do not divide"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_levels_that_cannot_be_are_refused(damage: str) -> None:
    changes, message = DAMAGES[damage]
    graph = on_grid(residual_graph(4, 4), GRIDS["odd, 2 bits"])

    def changed(weight: Weight) -> Weight:
        return weight if weight.levels is None else replace(weight, **changes)

    if not message:
        validate_graph(with_weights(graph, changed))
        return
    with pytest.raises(ExportError, match=r"^Conv block1\.conv1: " + message):
        validate_graph(with_weights(graph, changed))
