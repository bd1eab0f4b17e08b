"""Whole files: our own, those of onnxruntime's quantiser and of brevitas, and files of which little can be said."""

import dataclasses
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from foreign_files import LAYERS, PARAMETERS, float_network, quantized
from one_fault import SCALE, WEIGHT_SCALE, Sketch, between, convolution, gemm
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType
from qdq_models import residual_network
from qdq_storage import STORAGES, STORED_BITS

from mecdeploy.runtime_checks import CheckError, InspectionReport, inspect_model, inspection
from mecdeploy.runtime_checks.attribution import Attribution
from mecdeploy.runtime_checks.runtime import Refusal

FOREIGN = Path(__file__).parent / "foreign"


def written(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def inspected(model: onnx.ModelProto, folder: Path) -> InspectionReport:
    return inspect_model(written(model, folder))


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(float_network(), tmp_path_factory.mktemp("float"))


@pytest.mark.parametrize("storage", STORAGES)
def test_weights_in_every_storage(storage: str, tmp_path: Path) -> None:
    """Against the bytes and values that the file was made of."""
    model = residual_network(storage=storage)
    report = inspected(model, tmp_path)
    (layer,) = [layer for layer in report.layers if layer.name == "block.conv1"]
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    holder = "block.conv1/weight" if storage == "int8" else "block.conv1/weight/packed"
    bits = STORED_BITS[storage]
    weights = layer.weights
    assert (weights.storage, weights.stored_bits) == ("table" if "table" in storage else storage, bits)
    assert (weights.tensor, weights.bytes) == (holder, len(stored[holder].raw_data))
    low, high = (-64, 63) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (weights.smallest, weights.largest, weights.used_bits) == (low, high, 7 if bits == 8 else bits)
    assert weights.levels == 2 ** (7 if bits == 8 else bits)
    scales = numpy_helper.to_array(stored["block.conv1/weight/scale"])
    assert (weights.per, weights.scale) == ("channel", (scales.min(), scales.max()))
    assert (layer.kernel, layer.arithmetic, layer.bias) == ("QLinearConv", "integer", "int32")
    assert layer.input is not None and layer.output is not None
    assert (layer.input.bits, layer.output.bits, layer.output.zero_point) == (4, 4, (0, 0))


def test_our_own_metadata_is_shown_and_not_needed(tmp_path: Path) -> None:
    model = residual_network()
    helper.set_model_props(
        model,
        {prop.key: prop.value for prop in model.metadata_props}
        | {"mecdeploy.class_names": '["a", "b", "c"]', "mecdeploy.checkpoint_sha256": "12ab"},
    )
    report = inspected(model, tmp_path)
    assert report.metadata is not None and report.metadata.weight_bits is not None
    assert (report.metadata.classes, report.metadata.checkpoint_sha256, report.metadata.target) == (
        3,
        "12ab",
        "onnxruntime",
    )
    assert report.metadata.weight_bits["block.conv1"] == 4
    assert report.runtime.islands == () and report.warnings == ()
    assert len(report.runtime.integer_products) == 9
    for prop in model.metadata_props:
        prop.value = prop.value.replace('"stem": 8', '"stem": 4')
    assert inspected(model, tmp_path).warnings == ("stem: its weights are stored at 8 bits, the metadata promises 4.",)
    for prop in model.metadata_props:
        prop.value = "{" if prop.key == "mecdeploy.weight_bits" else prop.value
    damaged = inspected(model, tmp_path).metadata
    assert damaged is not None and damaged.weight_bits is None and damaged.classes == 3
    del model.metadata_props[:]
    foreign = inspected(model, tmp_path)
    assert foreign.metadata is None
    assert [layer.weights for layer in foreign.layers] == [layer.weights for layer in report.layers]


@pytest.mark.parametrize("name", ["ours", "float", "int8"])
def test_bytes_add_up_to_the_file(name: str, float_file: Path, tmp_path: Path) -> None:
    """And those of the constants are what is saved where their values are gone."""
    if name == "ours":
        path = written(residual_network(), tmp_path)
    else:
        path = float_file if name == "float" else quantized(float_file, tmp_path / "int8.onnx", per_channel=True)
    facts = inspect_model(path).file
    assert facts.bytes == path.stat().st_size == facts.tensor_bytes + facts.metadata_bytes + facts.graph_bytes
    assert facts.tensor_bytes == sum(tensor.bytes for tensor in facts.tensors)
    assert list(facts.tensors) == sorted(facts.tensors, key=lambda tensor: -tensor.bytes)
    model = onnx.load(path)
    whole = model.ByteSize()
    for tensor in model.graph.initializer:
        for field in ("raw_data", "float_data", "int32_data", "int64_data"):
            tensor.ClearField(field)
    lengths = 10 * len(model.graph.initializer) + 10  # a length before each tensor and the graph takes up to 10 bytes
    assert 0 <= whole - model.ByteSize() - facts.tensor_bytes <= lengths


def test_a_float_network(float_file: Path) -> None:
    report = inspect_model(float_file)
    assert [layer.name for layer in report.layers] == [f"node_{name}" for name in LAYERS]
    assert {layer.arithmetic for layer in report.layers} == {"float"}
    assert {(layer.weights.storage, layer.weights.levels, layer.weights.used_bits) for layer in report.layers} == {
        ("float32", None, None)
    }
    assert (report.file.parameters, report.file.producer) == (PARAMETERS, "elsewhere 1.2")
    (port,) = report.file.inputs
    assert (port.name, port.dtype, port.shape) == ("x", "float32", ("N", 4, 8, 8))
    (island,) = report.runtime.islands
    assert [reason.kind for reason in island.reasons] == ["nothing-quantised"]
    assert set(island.nodes) >= {f"node_{name}" for name in LAYERS}


STATIC = {
    "unsigned activations": (
        {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True},
        5, set(),
    ),
    "QOperator": (
        {
            "quant_format": QuantFormat.QOperator,
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QUInt8,
        },
        5,
        set(),
    ),
    # x86: what the block reads twice stays int8, and so do the convolution that writes it and those that read it
    "signed activations": (
        {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8},
        3, {"signed-activation"},
    ),
    "16 bits": ({"activation_type": QuantType.QUInt16, "weight_type": QuantType.QInt8}, 0, {"activation-type"}),
    "INT4 weights": ({"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt4}, 0, {"packed-weight"}),
}  # fmt: skip


@pytest.mark.parametrize("name", STATIC)
def test_what_onnxruntime_quantises_statically(name: str, float_file: Path, tmp_path: Path) -> None:
    options, integer, kinds = STATIC[name]
    report = inspect_model(quantized(float_file, tmp_path / "static.onnx", **options))
    assert len(report.runtime.integer_products) == integer
    assert len(report.layers) == 5 and report.file.parameters == PARAMETERS
    found = {reason.kind for layer in report.layers for reason in layer.reasons}
    # a sigmoid has no kernel for codes of 16 bits either, and says the same
    assert found == kinds == {reason.kind for island in report.runtime.islands for reason in island.reasons}
    assert {layer.weights.per for layer in report.layers} == {"channel" if options.get("per_channel") else "tensor"}
    if name == "INT4 weights":
        assert {(layer.weights.stored_bits, layer.weights.dtype) for layer in report.layers} == {(4, "int4")}
    if name == "QOperator":
        stem = report.layers[0]
        assert stem.input is not None and stem.output is not None
        assert stem.weights.zero_point != (0, 0) and stem.input.bits == stem.output.bits == 8


def test_what_onnxruntime_quantises_dynamically(float_file: Path, tmp_path: Path) -> None:
    report = inspect_model(quantized(float_file, tmp_path / "dynamic.onnx"))
    assert (len(report.runtime.mixed_products), report.runtime.integer_products) == (5, ())
    for layer in report.layers:
        assert (layer.arithmetic, layer.weights.stored_bits, layer.reasons[0].kind) == ("mixed", 8, "dynamic")
        assert layer.input is not None and layer.input.scale is None


def test_a_file_of_brevitas() -> None:
    """4 bits that take 8 in the file, signed codes that a Clip keeps from uint8, and a Flatten in the way."""
    report = inspect_model(FOREIGN / "brevitas-qcdq.onnx")
    rows = {layer.name: layer for layer in report.layers}
    assert list(rows) == ["/first/Conv", "/second/Conv", "/third/Conv", "/classifier/Gemm"]
    for layer in report.layers:
        weights = layer.weights
        assert (weights.storage, weights.stored_bits, weights.used_bits, weights.clip) == ("int8", 8, 4, True)
        assert weights.smallest == -7 and weights.levels is not None and weights.levels <= 15
    first = rows["/first/Conv"]
    assert first.input is not None and first.output is not None
    assert (first.kernel, first.input.dtype, first.output.dtype, first.output.bits) == (
        "QLinearConv",
        "int8",
        "uint8",
        4,
    )
    reasons = {name: [reason.kind for reason in layer.reasons] for name, layer in rows.items()}
    assert reasons == {
        "/first/Conv": [],
        "/second/Conv": ["signed-activation"],
        "/third/Conv": ["signed-activation"],
        "/classifier/Gemm": ["moved-input"],
    }
    assert "Clip /signed/act_quant/export_handler/Clip reads it" in rows["/second/Conv"].reasons[0].what


def test_a_matrix_product_between_activations_has_no_weights(tmp_path: Path) -> None:
    sketch = Sketch()
    sketch.quantize("x", "xq")
    turned = sketch.op("Transpose", [sketch.dequantize("xq", "xq", "xd")], "turned", perm=[0, 1, 3, 2])
    sketch.op("Softmax", [sketch.op("MatMul", ["xd", turned], "scores")], "y")
    report = inspected(sketch.finish("y"), tmp_path)
    assert report.layers == ()
    assert report.runtime.mixed_products + report.runtime.float_products == ("node_scores",)


def test_block_weights_go_to_a_packed_product(tmp_path: Path) -> None:
    sketch = Sketch()
    codes = sketch.packed("w", TensorProto.INT4, (32, 4), 64)
    scale = sketch.constant("w_scale", np.full((2, 4), 0.1))
    real = sketch.op("DequantizeLinear", [codes, scale], "real", axis=0, block_size=16)
    sketch.op("MatMul", ["x", real], "y")
    report = inspected(sketch.finish("y", shape=(32,)), tmp_path)
    (layer,) = report.layers
    assert (layer.kernel, layer.arithmetic) == ("MatMulNBits", "float")
    assert (layer.weights.storage, layer.weights.per, layer.weights.bytes) == ("int4", "block", 64)
    assert {"graph-input", "packed-weight", "weight-blocks"} <= {reason.kind for reason in layer.reasons}


def test_an_optimised_file_of_packed_products(tmp_path: Path) -> None:
    """MatMulNBits in the file itself, its weights as unsigned fields: counted against an unpacking by loops."""
    rng = np.random.default_rng(0)
    blobs = rng.integers(0, 256, (4, 2, 8)).astype(np.uint8)
    sketch = Sketch()
    inputs = ["x", sketch.constant("w", blobs, np.uint8), sketch.constant("s", np.full(8, 0.1))]
    sketch.op("MatMulNBits", inputs, "y", domain="com.microsoft", K=32, N=4, bits=4, block_size=16)
    model = sketch.finish("y", shape=(32,))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    (layer,) = inspected(model, tmp_path).layers
    nibbles = [part for byte in blobs.reshape(-1).tolist() for part in (byte % 16, byte // 16)]
    assert (layer.weights.shape, layer.weights.stored_bits, layer.weights.bytes) == ((4, 32), 4, 64)
    assert (layer.weights.levels, layer.weights.smallest) == (len(set(nibbles)), min(nibbles))


def test_float16(float_file: Path, tmp_path: Path) -> None:
    model = float_network()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    report = inspected(model, tmp_path)
    assert {(layer.weights.storage, layer.weights.stored_bits, layer.kernel) for layer in report.layers} <= {
        ("float16", 16, "Conv"), ("float16", 16, "FusedConv"), ("float16", 16, "MatMul"),
    }  # fmt: skip
    assert len(report.layers) == 5


def test_external_data_counts_and_has_to_be_there(tmp_path: Path) -> None:
    model, plain = float_network(), tmp_path / "plain.onnx"
    plain.write_bytes(model.SerializeToString())
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=1000)
    report, whole = inspect_model(path), inspect_model(plain)
    assert [layer.weights for layer in report.layers] == [layer.weights for layer in whole.layers]
    outside = [tensor for tensor in report.file.tensors if tensor.external is not None]
    assert {tensor.external for tensor in outside} == {"weights.bin"}
    assert report.file.external_bytes == sum(tensor.bytes for tensor in outside) == (8 * 4 + 2 * 8 * 8) * 9 * 4
    (tmp_path / "weights.bin").rename(tmp_path / "elsewhere.bin")
    with pytest.raises(CheckError, match="model.onnx: its external data cannot be read .*weights.bin.* beside it"):
        inspect_model(path)


def test_several_inputs_and_sizes_left_open(tmp_path: Path) -> None:
    sketch = Sketch()
    sketch.op("Add", ["x", "z"], "y")
    model = sketch.finish("y", shape=(4,))
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    model.graph.input.append(helper.make_tensor_value_info("k", TensorProto.INT64, [None, 2]))
    facts = inspected(model, tmp_path).file
    assert [(port.name, port.dtype, port.shape) for port in facts.inputs] == [
        ("x", "float32", ("N", 4)), ("z", "float32", None), ("k", "int64", (None, 2)),
    ]  # fmt: skip


def test_nodes_without_names_and_functions(tmp_path: Path) -> None:
    model = convolution(after=between("Tanh"))
    for node in model.graph.node:
        node.name = ""
    (layer,) = inspected(model, tmp_path).layers
    assert layer.name == "conv" and layer.reasons[0].what.startswith("Tanh between_Tanh stands between it and")
    inner = helper.make_node("Conv", ["a", "w"], ["b"], name="inside", pads=[1, 1, 1, 1])
    function = helper.make_function("local", "Block", ["a", "w"], ["b"], [inner], [helper.make_opsetid("", 21)])
    sketch = Sketch()
    sketch.op("Block", ["x", sketch.constant("w", np.ones((4, 4, 3, 3)))], "y", domain="local")
    outer = sketch.finish("y")
    outer.functions.append(function)
    outer.opset_import.append(helper.make_opsetid("local", 1))
    (layer,) = inspected(outer, tmp_path).layers
    assert (layer.op, layer.kernel) == ("Conv", "Conv")


def test_a_file_that_onnxruntime_refuses_is_described_all_the_same(tmp_path: Path) -> None:
    model = residual_network()
    model.graph.node.append(helper.make_node("Teleport", ["logits"], ["far"], name="far", domain="nowhere"))
    model.opset_import.append(helper.make_opsetid("nowhere", 1))
    report = inspected(model, tmp_path)
    assert report.runtime.error is not None and "Teleport" in report.runtime.error
    assert {(layer.kernel, layer.arithmetic, layer.reasons) for layer in report.layers} == {(None, None, ())}
    assert len(report.layers) == 9 and report.runtime.kernels == {}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "the file is empty"),
        (b"\x89PNG\r\n\x1a\n not a model at all", "not a readable ONNX file|holds no ONNX graph"),
        (b"ir_version: 10", "not a readable ONNX file|holds no ONNX graph"),
    ],
)
def test_what_is_no_model(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(CheckError, match=complaint):
        inspect_model(path)
    with pytest.raises(CheckError, match="gone.onnx: no such file"):
        inspect_model(tmp_path / "gone.onnx")
    with pytest.raises(CheckError, match="cannot be read"):
        inspect_model(tmp_path)


def test_every_truncation_is_an_error_or_a_report(tmp_path: Path) -> None:
    """Cut anywhere, a file is refused, or is a smaller model, of which nothing is claimed that is not there."""
    whole = residual_network().SerializeToString()
    outcomes: Counter[str] = Counter()
    for size in np.linspace(1, len(whole) - 1, 25).astype(int).tolist():
        path = tmp_path / "cut.onnx"
        path.write_bytes(whole[:size])
        try:
            assert inspect_model(path).file.bytes == size
            outcomes["report"] += 1
        except CheckError:
            outcomes["refused"] += 1
    assert outcomes["refused"] >= 20


@pytest.mark.parametrize("storage", ["int4", "table3"])
def test_any_damage_is_an_error_or_a_report(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost inputs and outputs, other operators, types, shapes and bytes. Not for onnxruntime: some versions crash."""

    def refuse(proto: onnx.ModelProto, label: str) -> Attribution:
        raise Refusal(label, "not asked")

    monkeypatch.setattr(inspection, "attribute", refuse)
    model, draw = residual_network(storage=storage), random.Random(0)
    outcomes: Counter[str] = Counter()
    for turn in range(40):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        node, tensor = draw.choice(copy.graph.node), draw.choice(copy.graph.initializer)
        match turn % 8:
            case 0:
                node.input.pop()
            case 1:
                node.output.pop()
            case 2:
                node.input[draw.randrange(len(node.input))] = ""
            case 3:
                node.op_type = draw.choice(["Conv", "QLinearConv", "MatMulNBits", "DequantizeLinear", "Clip", "Concat"])
            case 4:
                tensor.dims.append(draw.randrange(4))
            case 5:
                tensor.data_type = draw.choice(sorted(TensorProto.DataType.values()))
            case 6:
                del node.attribute[:]
            case 7:
                tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]
        content = bytearray(copy.SerializeToString())
        for _ in range(turn % 3):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path = tmp_path / "damaged.onnx"
        path.write_bytes(content)
        try:
            report = inspect_model(path)
            json.dumps(report.to_json(), allow_nan=False)
            outcomes["layers" if report.layers else "no layers"] += 1
        except CheckError:
            outcomes["no model"] += 1
    assert min(outcomes["layers"], outcomes["no layers"]) > 0, outcomes


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(convolution().SerializeToString().replace(b"node_conv", b"node_\xffonv"))
    with pytest.raises(CheckError, match="model.onnx: not a readable ONNX file; a name in it is damaged"):
        inspect_model(path)


def run_both(path: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the file says, as the optimiser off computes it, and what the integer kernels make of it."""
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    sessions = [
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for options in (plain, onnxruntime.SessionOptions())
    ]
    exact, fused = (session.run(None, {"x": x})[0] for session in sessions)
    return exact, fused


def test_scales_on_the_wrong_axis_are_warned_of_and_compute_something_else(tmp_path: Path) -> None:
    """onnxruntime makes an integer kernel of it: its result is not that of the file, which the optimiser off gives."""

    def uneven(axis: int) -> onnx.ModelProto:
        model = convolution(weight=lambda sketch: sketch.weight((4, 4, 3, 3), axis=axis), bias=None)
        for tensor in model.graph.initializer:
            if tensor.name == "w_scale":
                tensor.CopyFrom(numpy_helper.from_array(np.array([0.001, 0.02, 0.04, 0.08], np.float32), "w_scale"))
        return model

    x = np.random.default_rng(2).normal(size=(2, 4, 8, 8)).astype(np.float32)
    steps = {}
    for axis in (0, 1):
        path = written(uneven(axis), tmp_path)
        exact, fused = run_both(path, x)
        steps[axis] = np.abs(exact - fused).max() / 0.05
    assert steps[0] <= 1.01  # one step of the output, where a float lay on the other side of a half
    assert steps[1] > 10
    (warning,) = inspect_model(path).warnings
    assert warning.startswith(
        "node_conv: the scales of its weight w_q lie along axis 1, its outputs along axis 0. QLinear"
    )
    assert inspected(uneven(0), tmp_path).warnings == ()


def test_a_bias_in_other_steps_is_warned_of_and_computes_something_else(tmp_path: Path) -> None:
    """onnxruntime checks the bias scale of a convolution, and not that of a Gemm."""
    for factor in (1, 2):
        path = written(gemm(bias=True, bias_scale=factor), tmp_path)
        report = inspect_model(path)
        assert report.layers[0].arithmetic == "integer"
        exact, fused = run_both(path, np.ones((1, 8), np.float32))
        error = np.abs(exact - fused).max() / (SCALE * WEIGHT_SCALE)  # in steps of the product
        if factor == 1:
            assert error < 1e-3 and report.warnings == ()  # float32 sums, of at most 2 ** 14 steps
        else:
            assert error > 1
            (warning,) = report.warnings
            assert "the scale of its bias b_q is not input scale times weight scale (up to 2 times off)" in warning


def test_a_scale_for_each_channel_of_an_activation_is_warned_of_and_fails(tmp_path: Path) -> None:
    model = convolution(bias=None)
    for tensor in model.graph.initializer:
        if tensor.name in ("xq_scale", "xq_zero"):
            value = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.full(4, value), tensor.name))
    path = written(model, tmp_path)
    (warning,) = inspect_model(path).warnings
    assert warning.startswith("node_conv: its input has 4 scales. QLinearConv takes one for the whole tensor")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="QLinearConv"):  # onnxruntime's errors share no narrower base class
        session.run(None, {"x": np.zeros((1, 4, 8, 8), np.float32)})


def test_the_report_is_json_of_its_own_field_names(tmp_path: Path) -> None:
    for model in (residual_network(), float_network(), convolution(after=between("Tanh"))):
        report = inspected(model, tmp_path)
        back = json.loads(json.dumps(report.to_json(), allow_nan=False))
        assert list(back) == [field.name for field in dataclasses.fields(report)]
        assert len(back["layers"]) == len(report.layers)
        assert math.prod(back["layers"][0]["weights"]["shape"]) > 0
