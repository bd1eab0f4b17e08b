"""Each pass alone, and the runner that names a culprit."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from graph_maker import Maker
from handmade_graphs import pixels_for, residual_graph
from integer_witness import evaluate
from island_graphs import attention_graph
from onnx_sessions import expose_units, run

from mecdeploy.export import ExportConfig, ExportError, compile_graph, export_model
from mecdeploy.export.graph import Add, Conv, Gemm, IntegerGraph, MaxPool, Weight, outputs_of
from mecdeploy.export.passes import PASSES, run_passes
from mecdeploy.export.passes.choose_packed_bits import choose_packed_bits
from mecdeploy.export.passes.remove_dead_nodes import remove_dead_nodes
from mecdeploy.export.passes.split_add_outputs import split_add_outputs
from mecdeploy.export.passes.write_out_ceil_mode import write_out_ceil_mode

CONFIG = ExportConfig()


def weights_of(graph: IntegerGraph) -> dict[str, Weight]:
    return {node.name: node.weight for node in graph.nodes if isinstance(node, Conv | Gemm)}


def test_the_recipe() -> None:
    names = "remove_dead_nodes split_add_outputs write_out_ceil_mode choose_packed_bits choose_storage"
    assert [rewrite.__name__ for rewrite in PASSES] == names.split()  # type: ignore[attr-defined]


def test_passes_leave_their_argument_alone() -> None:
    graph = residual_graph()
    before = (graph.nodes, dict(graph.values), [weight.storage for weight in weights_of(graph).values()])
    compile_graph(graph, ExportConfig(bits=8))
    assert before == (graph.nodes, dict(graph.values), [weight.storage for weight in weights_of(graph).values()])


def test_passes_change_no_integer() -> None:
    graph = residual_graph()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 11, 9), dtype=np.uint8)
    before, after = evaluate(graph, pixels), evaluate(compile_graph(graph, CONFIG), pixels)
    assert before.keys() == after.keys()
    for name, codes in before.items():
        np.testing.assert_array_equal(codes, after[name], err_msg=name)


def test_remove_dead_nodes_drops_nodes_outputs_and_values_that_nothing_reads() -> None:
    graph = residual_graph()
    nodes = list(graph.nodes)
    # the projection reads the 4-bit sum in place of the 8-bit one, and a copy of the first convolution reads nothing on
    down = next(node for node in nodes if node.name == "block2.down")
    nodes[nodes.index(down)] = replace(down, input="block1.add/act")
    nodes.insert(3, replace(nodes[2], name="dead", output="dead"))
    values = {**graph.values, "dead": replace(graph.values["block1.conv1"], name="dead")}
    cleaned = run_passes(replace(graph, nodes=tuple(nodes), values=values), CONFIG, [remove_dead_nodes])
    assert [node.name for node in cleaned.nodes] == [node.name for node in graph.nodes]
    (add,) = (node for node in cleaned.nodes if node.name == "block1.add")
    assert isinstance(add, Add)
    assert add.outputs == ("block1.add/act",)
    assert cleaned.values.keys() == graph.values.keys() - {"block1.add/skip"}


def test_remove_dead_nodes_keeps_a_graph_that_needs_everything() -> None:
    graph = residual_graph()
    cleaned = remove_dead_nodes(graph, CONFIG)
    assert cleaned.nodes == graph.nodes
    assert cleaned.values == graph.values


def test_remove_dead_nodes_keeps_an_island_whole_and_drops_one_that_nothing_reads() -> None:
    graph = attention_graph(calm=True)
    pruned = remove_dead_nodes(replace(graph, output="scores"), CONFIG)
    assert [node.name for node in pruned.nodes] == [node.name for node in graph.nodes[:-1]]
    assert pruned.values.keys() == graph.values.keys() - {"logits"}
    # the residual stream is read no more, and stays an output of the island that makes it
    nodes = tuple(replace(node, inputs=("out", "back")) if node.name == "first" else node for node in graph.nodes)
    kept = run_passes(replace(graph, nodes=nodes), CONFIG, [remove_dead_nodes])
    (residual,) = (node for node in kept.nodes if node.name == "residual")
    assert outputs_of(residual) == ("residual.total", "residual.normed")
    assert "residual.total" in kept.values


def test_split_add_outputs_makes_one_add_per_output_in_place() -> None:
    graph = residual_graph()
    split = split_add_outputs(graph, CONFIG)
    names = [node.name for node in graph.nodes]
    at = names.index("block1.add")
    expected = [*names[:at], "block1.add/skip", "block1.add/act", *names[at + 1 :]]
    assert [node.name for node in split.nodes] == expected
    for node in split.nodes[at : at + 2]:
        assert isinstance(node, Add)
        assert node.outputs == (node.name,)
        assert node.inputs == ("block1.conv2", "maxpool")
    assert [node.name for node in split.nodes if isinstance(node, Add)][2] == "block2.add"  # one output: kept as it is


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 3, 1), (3, 2, 1), (2, 2, 0), (3, 3, 1), (1, 2, 0)])
@pytest.mark.parametrize("size", range(4, 9))
def test_write_out_ceil_mode_makes_the_same_windows(size: int, kernel: int, stride: int, padding: int) -> None:
    make = Maker("ceil", (1, size, size + 1), 0)
    stem = make.conv("stem", "pixels", 2, 1, weight_bits=4, act_bits=8)
    pooled = make.max_pool("pool", stem, kernel, stride, padding=padding, ceil=True)
    make.gemm("classifier", make.flatten("flat", pooled), 3, weight_bits=4, act_bits=None)
    graph = make.graph()
    (pool,) = (node for node in write_out_ceil_mode(graph, CONFIG).nodes if isinstance(node, MaxPool))
    assert not pool.ceil_mode
    # PyTorch's rule: windows start inside the input or its near padding
    for axis in (1, 2):
        extent = (size, size + 1)[axis - 1]
        reach = extent + 2 * padding - kernel
        starts = [start for start in range(0, reach + stride, stride) if start < extent + padding]
        assert graph.values["pool"].shape[axis] == len(starts)
    pixels = pixels_for(graph, 3)
    computed = run(expose_units(export_model(graph, CONFIG, {})), pixels)
    np.testing.assert_array_equal(computed["pool"], evaluate(graph, pixels)["pool"])


def test_write_out_ceil_mode_leaves_other_pools_alone() -> None:
    graph = residual_graph()
    assert write_out_ceil_mode(graph, CONFIG).nodes == graph.nodes


@pytest.mark.parametrize(
    ("trained", "bits", "packed"),
    [
        (2, None, {2, 8}), (2, 2, {2, 8}), (2, 3, {3, 8}), (2, 4, {4, 8}), (2, 8, {8}),
        (3, None, {3, 8}), (3, 3, {3, 8}), (3, 4, {4, 8}), (4, 4, {4, 8}), (4, 8, {8}), (8, None, {8}), (8, 8, {8}),
    ],
)  # fmt: skip
def test_choose_packed_bits(trained: int, bits: int | None, packed: set[int]) -> None:
    graph = residual_graph(trained)
    chosen = weights_of(choose_packed_bits(graph, ExportConfig(bits=bits)))
    assert {weight.packed_bits for weight in chosen.values()} == packed
    assert chosen["stem"].packed_bits == 8
    assert {name: weight.bits for name, weight in chosen.items()} == {
        name: weight.bits for name, weight in weights_of(graph).items()
    }


@pytest.mark.parametrize(("trained", "bits", "named"), [(4, 2, "block1.conv1"), (3, 2, "block1.conv1"), (8, 4, "stem")])
def test_narrower_than_trained_is_refused(trained: int, bits: int, named: str) -> None:
    message = (
        f"{named}: its weights were trained at {trained} bits; packing them at {bits} would round them once more and "
        f"change what was trained. Export with {trained} bits or wider, or train again with quant.weight_bits = {bits}."
    )
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        compile_graph(residual_graph(trained), ExportConfig(bits=bits))


def test_one_wider_unit_decides_what_is_narrower() -> None:
    graph = residual_graph(2)
    nodes = tuple(
        replace(node, weight=replace(node.weight, bits=4))
        if isinstance(node, Conv) and node.name == "block2.down"
        else node
        for node in graph.nodes
    )
    with pytest.raises(ExportError, match=r"^block2\.down: its weights were trained at 4 bits; packing them at 3"):
        choose_packed_bits(replace(graph, nodes=nodes), ExportConfig(bits=3))
    chosen = weights_of(choose_packed_bits(replace(graph, nodes=nodes), ExportConfig(bits=4)))
    assert {weight.packed_bits for weight in chosen.values()} == {4, 8}


@pytest.mark.parametrize(
    ("target", "trained", "storage"),
    [
        ("onnxruntime", 2, "int2"), ("onnxruntime", 3, "table"), ("onnxruntime", 4, "int4"), ("onnxruntime", 8, "int8"),
        ("portable", 2, "table"), ("portable", 3, "table"), ("portable", 4, "table"), ("portable", 8, "int8"),
    ],
)  # fmt: skip
def test_choose_storage(target: str, trained: int, storage: str) -> None:
    compiled = weights_of(compile_graph(residual_graph(trained), ExportConfig(target=target)))
    assert {name: weight.storage for name, weight in compiled.items() if weight.bits == trained} == {
        name: storage for name, weight in compiled.items() if weight.bits == trained
    }
    assert compiled["classifier"].storage == "int8"


def test_the_runner_names_the_pass_that_broke_the_graph() -> None:
    def lose_the_stem(graph: IntegerGraph, config: ExportConfig) -> IntegerGraph:
        return replace(graph, nodes=graph.nodes[1:])

    with pytest.raises(ExportError, match="pass lose_the_stem broke the graph: MaxPool maxpool: reads stem before"):
        run_passes(residual_graph(), CONFIG, [split_add_outputs, lose_the_stem])


def test_the_runner_refuses_a_broken_graph_before_any_pass() -> None:
    graph = residual_graph()
    with pytest.raises(ExportError, match=r"^MaxPool maxpool: reads stem before"):
        run_passes(replace(graph, nodes=graph.nodes[1:]), CONFIG, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "export.bits is 5; choose one of 1, 2, 3, 4, 8."),
        ({"target": "tensorrt"}, "export.target is 'tensorrt'; choose one of onnxruntime, portable."),
        ({"input": "int8"}, "export.input is 'int8'; choose one of uint8, float."),
    ],
)
def test_options_are_refused_where_they_are_made(options: dict[str, object], message: str) -> None:
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        ExportConfig(**options)  # type: ignore[arg-type]
