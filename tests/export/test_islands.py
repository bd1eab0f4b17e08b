"""Float islands in the file: what connects to what, under which names, and what stays integer around them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from handmade_graphs import pixels_for, residual_graph
from integer_witness import evaluate
from island_graphs import attention_graph, island_graph, tokens_first_graph
from onnx.reference import ReferenceEvaluator
from onnx_files import constants, exported, writers
from onnx_sessions import expose_units, kernels, metadata_of, optimized, run

from mecdeploy.export import ExportConfig, export_model
from mecdeploy.export.graph import FloatIsland, IntegerGraph, Quantize

TARGETS = ("onnxruntime", "portable")
OWN_OPSET = 21
"""What the islands here are written for."""


def float_values(graph: IntegerGraph) -> list[str]:
    return [node.output for node in graph.nodes if isinstance(node, Quantize)]


@pytest.mark.parametrize("calm", [False, True])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weight_bits", [2, 4, 8])
def test_gemms_between_islands_are_integer_kernels(weight_bits: int, target: str, calm: bool, tmp_path: Path) -> None:
    model = exported(attention_graph(weight_bits, calm=calm), target=target)
    assert model.opset_import[0].version == (25 if (weight_bits, target) == (2, "onnxruntime") else 21)
    for data in (model.SerializeToString(), expose_units(model.SerializeToString())):
        found = kernels(optimized(data, tmp_path))
        assert (found["QLinearConv"], found["QGemm"], found["Gemm"], found["Conv"]) == (1, 5, 0, 0)
        # the two products of attention are all that is multiplied in float
        assert found["MatMul"] + found["FusedMatMul"] == 2
        assert (found["LayerNormalization"], found["Gelu"], found["QuantizeLinear"]) == (3, 1, 5)
        assert found["LogSoftmax"] == calm
        # no Quantize reads the one output that a rewrite could reach, so that it takes no barrier
        assert found["Sum"] == 0


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("build", [attention_graph, tokens_first_graph])
def test_from_its_islands_codes_on_every_unit_computes_the_witness_integers(
    build: Callable[..., IntegerGraph], act_bits: int, count: int
) -> None:
    graph = build(4, act_bits)
    pixels = pixels_for(graph, count)
    data = export_model(graph, ExportConfig(), {})
    computed = run(expose_units(data), pixels)
    expected = evaluate(graph, pixels, {name: computed[name] for name in float_values(graph)})
    assert {name: one for name, one in computed.items() if one.dtype == np.uint8}.keys() < expected.keys()
    for name, values in computed.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    np.testing.assert_array_equal(run(data, pixels)["logits"], computed["logits"])


def test_islands_compute_what_onnx_says() -> None:
    """Each island alone in onnx's reference: its codes are the file's, or a neighbour where a rounding hangs by a hair.

    One step: the two orders of float summation differ by 1e-6 of a value, thousands of times less than a step.
    """
    graph = attention_graph(4, 8, calm=True)
    pixels = pixels_for(graph, 3)
    computed = run(expose_units(export_model(graph, ExportConfig(), {})), pixels)
    integers = evaluate(graph, pixels, {name: computed[name] for name in float_values(graph)})
    reals = {"pixels": pixels, **{name: one for name, one in integers.items() if one.dtype == np.float32}}
    tokens = graph.values["tokens"].quantization
    assert tokens is not None
    reals["tokens"] = (integers["tokens"].astype(np.float32) - tokens.zero_point) * np.float32(tokens.scale)
    for node in graph.nodes:
        if isinstance(node, FloatIsland):
            model = onnx.helper.make_model(node.graph, opset_imports=[onnx.helper.make_opsetid("", OWN_OPSET)])
            feeds = {entry.name: reals[name] for entry, name in zip(node.graph.input, node.inputs, strict=True)}
            reals.update(zip(node.outputs, ReferenceEvaluator(model).run(None, feeds), strict=True))
        elif isinstance(node, Quantize):
            codes = graph.values[node.output].quantization
            assert codes is not None
            steps = np.rint(reals[node.input] / np.float32(codes.scale)) + codes.zero_point
            distance = np.abs(np.clip(steps, 0, codes.qmax) - computed[node.output])
            assert distance.max() <= 1, node.name
            assert (distance > 0).mean() < 1e-3, node.name
    np.testing.assert_allclose(reals["logits"], computed["logits"], atol=1e-5)


def test_the_batch_is_free() -> None:
    graph = attention_graph()
    data = export_model(graph, ExportConfig(), {})
    pixels = pixels_for(graph, 4)
    whole = run(data, pixels)["logits"]
    for index in range(4):
        np.testing.assert_array_equal(run(data, pixels[index : index + 1])["logits"], whole[index : index + 1])


def test_a_float_input_gives_the_logits_of_its_pixels() -> None:
    graph = attention_graph()
    pixels = pixels_for(graph, 3)
    data = export_model(graph, ExportConfig(input="float"), {})
    logits = run(data, pixels.astype(np.float32) / np.float32(255))["logits"]
    np.testing.assert_array_equal(logits, run(export_model(graph, ExportConfig(), {}), pixels)["logits"])


def test_names() -> None:
    graph = attention_graph(calm=True)
    model = exported(graph)
    islands = {node.name: node for node in graph.nodes if isinstance(node, FloatIsland)}
    written = {name for node in model.graph.node for name in node.output}
    assert set(graph.values) <= written | {"pixels"}
    for name, island in islands.items():
        nodes = [node for node in model.graph.node if node.name.startswith(f"{name}/")]
        own = [node for node in nodes if node.op_type in {one.op_type for one in island.graph.node}]
        assert [node.op_type for node in own] == [node.op_type for node in island.graph.node]
        for node in nodes:
            assert all(output.startswith(f"{name}/") or output in island.outputs for output in node.output)
    reads = {node.name: list(node.input) for node in model.graph.node}
    assert reads["embed/0"] == ["pixels"]
    assert "tokens/real" in reads["embed/4"]
    assert reads["residual/0"] == ["embed.joined", "out"]
    assert reads["calm/0"] == ["scores"]


def test_constants_are_stored_once_and_only_where_read() -> None:
    spare = {"spare": np.ones(7), "gain": np.full(6, 2.0), "same": np.full(6, 2.0)}
    text = """island (float[N,6,8,8] x) => (float[N,6,8,8] y) {
        a = InstanceNormalization(x, gain, same)
        y = Tanh(a)
    }"""
    stored = constants(exported(island_graph(text, **spare)))
    assert [name for name in stored if name.startswith("island/")] == ["island/gain"]
    attention = constants(exported(attention_graph()))
    # three LayerNormalizations of one gain and one shift
    assert [name for name in attention if name.endswith(("gain", "shift"))] == ["embed/gain", "embed/shift"]


def test_what_an_exporter_wrote_beside_nodes_stays_out() -> None:
    graph = attention_graph()
    for island in (node for node in graph.nodes if isinstance(node, FloatIsland)):
        for inner in island.graph.node:
            inner.doc_string = "line 1 of /home/someone"
            inner.metadata_props.add(key="stack_trace", value="line 2 of /home/someone")
    assert b"/home/someone" not in export_model(graph, ExportConfig(), {})


def test_images_may_stand_behind_tokens_between_islands(tmp_path: Path) -> None:
    graph = tokens_first_graph()
    model = exported(graph)
    arrays, made = constants(model), writers(model)
    assert [arrays[made[name].input[1]].tolist() for name in ("hidden", "back")] == [[16, -1, 9], [16, -1, 7]]
    found = kernels(optimized(model.SerializeToString(), tmp_path))
    assert (found["QLinearConv"], found["QGemm"], found["Gemm"] + found["MatMul"]) == (1, 3, 0)
    pixels = pixels_for(graph, 3)
    whole = run(model.SerializeToString(), pixels)["logits"]
    single = run(model.SerializeToString(), pixels[1:2])["logits"]
    np.testing.assert_array_equal(single, whole[1:2])


@pytest.mark.parametrize("graph", [attention_graph(), attention_graph(calm=True)], ids=["plain", "calm"])
def test_metadata(graph: IntegerGraph) -> None:
    props = metadata_of(export_model(graph, ExportConfig(), {}))
    assert json.loads(props["mecdeploy.float_values"]) == [
        "qkv.in", "out.in", "hidden.in", "back.in", "classifier.in",
    ]  # fmt: skip
    units = json.loads(props["mecdeploy.units"])
    assert units[:7] == ["patches", "rows", "tokens", "qkv.in", "qkv", "out.in", "out"]
    assert ("scores" in units) == (graph.nodes[-1].name == "calm")
    assert "logits" not in units
    assert "qkv" not in json.loads(props["mecdeploy.activation_bits"])
    islands = json.loads(props["mecdeploy.islands"])
    assert list(islands) == [node.name for node in graph.nodes if isinstance(node, FloatIsland)]
    assert islands["gelu"] == {"operators": ["made by hand"], "reason": "a test"}


def test_a_file_without_islands_says_nothing_of_them() -> None:
    props = metadata_of(export_model(residual_graph(), ExportConfig(), {}))
    assert not {"mecdeploy.float_values", "mecdeploy.islands"} & props.keys()


OUTPUTS = {
    "an input": "island (float[N,6,8,8] x) => (float[N,6,8,8] x) { unread = Tanh(x) }",
    "optional outputs": """island (float[N,6,8,8] x) => (float[N,6,8,8] y) {
        y, mean, deviation = LayerNormalization<axis = -1>(x, gain)
    }""",
    "branches": """island (float[N,6,8,8] x) => (float[N,6,8,8] y) <bool yes = {1}, float two = {2}> {
        doubled = Mul(x, two)
        y = If (yes) <
            then_branch = first () => (float[N,6,8,8] chosen) { chosen = Tanh(doubled) },
            else_branch = second () => (float[N,6,8,8] chosen) { chosen = Neg(doubled) }
        >
    }""",
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_whatever_an_output_is_it_arrives(case: str) -> None:
    graph = island_graph(OUTPUTS[case], gain=np.linspace(-1, 1, 8))
    pixels = pixels_for(graph, 2)
    (island,) = (node for node in graph.nodes if isinstance(node, FloatIsland))
    model = onnx.helper.make_model(island.graph, opset_imports=[onnx.helper.make_opsetid("", OWN_OPSET)])
    stem, codes = (graph.values[name].quantization for name in ("stem", "codes"))
    assert stem is not None
    assert codes is not None
    real = (evaluate_stem(graph, pixels).astype(np.float32) - stem.zero_point) * np.float32(stem.scale)
    (made,) = ReferenceEvaluator(model).run(None, {"x": real})
    expected = np.clip(np.rint(made / np.float32(codes.scale)) + codes.zero_point, 0, 255)
    np.testing.assert_array_equal(run(expose_units(export_model(graph, ExportConfig(), {})), pixels)["codes"], expected)


def evaluate_stem(graph: IntegerGraph, pixels: np.ndarray) -> np.ndarray:
    return evaluate(replace(graph, nodes=graph.nodes[:1]), pixels)["stem"]


def test_one_tensor_as_two_outputs() -> None:
    graph = attention_graph(calm=True)
    calm = graph.nodes[-1]
    assert isinstance(calm, FloatIsland)
    twice = onnx.GraphProto()
    twice.CopyFrom(calm.graph)
    twice.output.append(twice.output[0])
    values = {**graph.values, "copy": replace(graph.values["logits"], name="copy")}
    nodes = (*graph.nodes[:-1], replace(calm, outputs=("logits", "copy"), graph=twice))
    made = writers(exported(replace(graph, values=values, nodes=nodes)))
    assert (made["logits"].op_type, made["copy"].op_type, list(made["copy"].input)) == ("LogSoftmax", "Sum", ["logits"])
