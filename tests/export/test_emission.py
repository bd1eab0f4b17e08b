"""The emitted file itself: names, types, storage and metadata that others read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import numpy as np
import onnx
import pytest
from general_graphs import squeeze_excite_graph
from handmade_graphs import depthwise_graph, odd_graph, residual_graph
from onnx import TensorProto
from onnx_files import constants, exported, writers
from onnx_sessions import metadata_of

import mecdeploy
from mecdeploy.export import ExportConfig, ExportError, compile_graph, emit, export_model
from mecdeploy.export.emission.operators import EMITTERS
from mecdeploy.export.emission.weights import STORAGES
from mecdeploy.export.graph import Conv, Elementwise, Gemm, GlobalAveragePool, IntegerGraph, Node, outputs_of
from mecdeploy.export.weight_rules import STORAGE_BITS

BITS = (2, 3, 4, 8)
TARGETS = ("onnxruntime", "portable")


def test_every_node_type_and_every_storage_has_its_function() -> None:
    assert set(EMITTERS) == set(get_args(Node))
    assert set(STORAGES) == set(STORAGE_BITS) - {""}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weight_bits", BITS)
def test_opset_and_ir_are_the_oldest_that_hold_the_weights(weight_bits: int, target: str) -> None:
    model = exported(residual_graph(weight_bits), target=target)
    has_int2 = weight_bits == 2 and target == "onnxruntime"
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 25 if has_int2 else 21)]
    assert model.ir_version == (13 if has_int2 else 10)
    assert model.ir_version == onnx.helper.find_min_ir_version_for(model.opset_import)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weight_bits", BITS)
def test_initialisers_hold_raw_bytes_of_their_packed_size(weight_bits: int, target: str) -> None:
    model = exported(odd_graph(weight_bits), target=target)
    bits_of = {TensorProto.INT4: 4, TensorProto.INT2: 2}
    for tensor in model.graph.initializer:
        bits = bits_of.get(tensor.data_type) or onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
        assert len(tensor.raw_data) == -(-int(np.prod(tensor.dims, dtype=int)) * bits // 8), tensor.name


def test_packed_elements_by_target() -> None:
    def packed(weight_bits: int, target: str) -> set[int]:
        initializers = exported(odd_graph(weight_bits), target=target).graph.initializer
        return {tensor.data_type for tensor in initializers if tensor.name.endswith("/weight/packed")}

    assert packed(4, "onnxruntime") == {TensorProto.INT4}
    assert packed(2, "onnxruntime") == {TensorProto.INT2}
    assert packed(3, "onnxruntime") == packed(3, "portable") == {TensorProto.UINT16}
    assert packed(4, "portable") == packed(2, "portable") == {TensorProto.UINT8}
    assert packed(8, "portable") == packed(8, "onnxruntime") == set()


@pytest.mark.parametrize(("weight_bits", "shape"), [(2, (256, 4)), (3, (32768, 5)), (4, (256, 2))])
def test_a_table_is_stored_once_and_a_slice_only_where_a_count_fills_no_last_row(
    weight_bits: int, shape: tuple[int, ...]
) -> None:
    graph = odd_graph(weight_bits)
    model = exported(graph, target="portable")
    tables = [name for name in constants(model) if name.startswith("table/")]
    assert tables == [f"table/{weight_bits}bit"]
    assert constants(model)[tables[0]].shape == shape
    sliced = {name.removesuffix("/weight/codes") for name, node in writers(model).items() if node.op_type == "Slice"}
    weighted = [node for node in graph.nodes if isinstance(node, Conv | Gemm)]
    assert sliced == {node.name for node in weighted if node.weight.codes.size % shape[1]}
    assert len(sliced) > 0


def test_tensor_names() -> None:
    graph = residual_graph()
    model = exported(graph)
    made = writers(model)
    for node in compile_graph(graph, ExportConfig()).nodes:
        for output in outputs_of(node):
            quantization = graph.values[output].quantization
            if quantization is None:
                assert made[output].op_type == "Gemm"
            elif type(node).__name__ in ("MaxPool", "Flatten"):
                assert made[output].op_type == type(node).__name__
                assert list(made[output].input) == [node.input]  # type: ignore[union-attr]
            elif quantization.qmax < 255:
                clip = made[output]
                assert (clip.op_type, clip.input[0], clip.input[1]) == ("Clip", f"{output}/unclipped", "")
                assert constants(model)[clip.input[2]] == quantization.qmax
                assert made[f"{output}/unclipped"].op_type == "QuantizeLinear"
            else:
                assert made[output].op_type == "QuantizeLinear"
    for name in ("pixels", "stem", "maxpool", "block1.add/skip"):
        if f"{name}/real" in made:
            assert made[f"{name}/real"].op_type == "DequantizeLinear"
            assert made[f"{name}/real"].input[0] == name
    assert sum(node.op_type == "Add" for node in model.graph.node) == 3


def test_the_int8_weight_the_bias_and_its_scale_are_findable_by_name() -> None:
    graph = residual_graph(8)
    model = exported(graph)
    arrays = constants(model)
    for node in graph.nodes:
        if isinstance(node, Conv | Gemm):
            source = graph.values[node.input].quantization
            assert source is not None
            np.testing.assert_array_equal(arrays[f"{node.name}/weight"], node.weight.codes)
            np.testing.assert_array_equal(arrays[f"{node.name}/weight/scale"], node.weight.scale)
            np.testing.assert_array_equal(arrays[f"{node.name}/bias"], node.bias)
            scale = arrays[f"{node.name}/bias/scale"]
            assert scale.dtype == np.float32
            np.testing.assert_array_equal(scale, np.float32(source.scale) * node.weight.scale)


@pytest.mark.parametrize("input_kind", ["uint8", "float"])
def test_ends(input_kind: str) -> None:
    model = exported(depthwise_graph(), input=input_kind)
    (entry,), (output,) = model.graph.input, model.graph.output
    dims = [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim]
    assert dims == ["N", 1, 8, 8]
    expected = ("image", TensorProto.FLOAT) if input_kind == "float" else ("pixels", TensorProto.UINT8)
    assert (entry.name, entry.type.tensor_type.elem_type) == expected
    assert (output.name, output.type.tensor_type.elem_type) == ("logits", TensorProto.FLOAT)
    assert [dim.dim_param or dim.dim_value for dim in output.type.tensor_type.shape.dim] == ["N", 10]


def test_metadata() -> None:
    given = {"mecdeploy.class_names": '["a", "b"]', "mecdeploy.checkpoint_sha256": "00ff"}
    data = export_model(residual_graph(2), ExportConfig(bits=4, target="portable"), given)
    model, props = onnx.load_from_string(data), metadata_of(data)
    assert (model.producer_name, model.producer_version) == ("mecdeploy", mecdeploy.__version__)
    written = ("format", "weight_bits", "trained_bits", "activation_bits", "units", "input", "target")
    assert props.keys() == {f"mecdeploy.{key}" for key in written} | given.keys()
    assert given.items() <= props.items()
    assert (props["mecdeploy.format"], props["mecdeploy.target"]) == ("1", "portable")
    weighted = ["stem", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "block2.down", "hidden"]
    eights = {"stem": 8, "classifier": 8}
    assert json.loads(props["mecdeploy.weight_bits"]) == {**dict.fromkeys(weighted, 4), **eights}
    assert json.loads(props["mecdeploy.trained_bits"]) == {**dict.fromkeys(weighted, 2), **eights}
    units = json.loads(props["mecdeploy.units"])
    assert units == [
        "stem", "maxpool", "block1.conv1", "block1.conv2", "block1.add/skip", "block1.add/act", "block2.conv1",
        "block2.conv2", "block2.down", "block2.add/act", "pool", "flatten", "hidden",
    ]  # fmt: skip
    activation_bits = json.loads(props["mecdeploy.activation_bits"])
    assert list(activation_bits) == units
    assert (activation_bits["block1.add/skip"], activation_bits["block1.add/act"]) == (8, 4)


@pytest.mark.parametrize(
    ("graph", "options", "described"),
    [
        (residual_graph(), {}, ("uint8", 3, 11, 9, [0, 255], "RGB")),
        (depthwise_graph(), {"input": "float"}, ("float32", 1, 8, 8, [0, 1], "L")),
    ],
)
def test_the_input_contract(graph: IntegerGraph, options: dict[str, str], described: tuple[object, ...]) -> None:
    data = export_model(graph, ExportConfig(**options), {})  # type: ignore[arg-type]
    keys = ("dtype", "channels", "height", "width", "range", "color")
    expected = {**dict(zip(keys, described, strict=True)), "layout": "NCHW"}
    assert json.loads(metadata_of(data)["mecdeploy.input"]) == expected


def test_given_metadata_cannot_overwrite_what_the_graph_determines() -> None:
    model = emit(compile_graph(residual_graph(), ExportConfig()), ExportConfig(), {"mecdeploy.target": "other"})
    assert {prop.key: prop.value for prop in model.metadata_props}["mecdeploy.target"] == "onnxruntime"


def test_the_same_graph_gives_the_same_bytes() -> None:
    first, second = (export_model(residual_graph(), ExportConfig(), {"b": "1", "a": "2"}) for _ in range(2))
    assert first == second


def test_two_constants_of_one_name_are_refused() -> None:
    """A value's scale is found by its name; so are the constants that all nodes share."""
    graph = squeeze_excite_graph()
    name = "hard_sigmoid/half"
    nodes = tuple(
        replace(node, output=name)
        if node.name == "stem"
        else replace(node, inputs=tuple(name if read == "stem" else read for read in node.inputs))
        if isinstance(node, Elementwise)
        else replace(node, input=name)
        if isinstance(node, GlobalAveragePool) and node.name == "squeeze"
        else node
        for node in graph.nodes
    )
    values = {**graph.values, name: replace(graph.values["stem"], name=name)}
    with pytest.raises(ExportError, match=f"^{name}.*: two tensors of the ONNX file would have this name; rename the"):
        export_model(replace(graph, nodes=nodes, values=values), ExportConfig(), {})


@pytest.mark.parametrize("other", ["block1.conv2/real", "block2.down/real", "block2.conv1/sum", "hidden/bias"])
def test_two_tensors_of_one_name_are_refused(other: str) -> None:
    """A value may be called like a tensor of another unit, written before it or after; neither may take its place."""
    graph = residual_graph()
    nodes = tuple(
        replace(node, output=other)
        if isinstance(node, Conv) and node.name == "block1.conv1"
        else replace(node, input=other)
        if isinstance(node, Conv) and node.name == "block1.conv2"
        else node
        for node in graph.nodes
    )
    values = {**graph.values, other: replace(graph.values["block1.conv1"], name=other)}
    with pytest.raises(ExportError, match=f"^{other}: two tensors of the ONNX file would have this name; rename the"):
        export_model(replace(graph, nodes=nodes, values=values), ExportConfig(), {})
