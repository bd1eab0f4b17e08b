"""What any file reads: types, shapes and batches; refusals by name."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mecdeploy.runtime_checks import CheckError, parse_shape, random_feed, read_inputs


def write(path, *inputs, weight=None):
    """A model that passes its inputs through; one as (name, type, shape)."""
    values = [helper.make_tensor_value_info(*one) for one in inputs]
    nodes = [helper.make_node("Identity", [one[0]], [f"{one[0]}.out"]) for one in inputs]
    outputs = [helper.make_tensor_value_info(f"{one[0]}.out", one[1], None) for one in inputs]
    constants = [] if weight is None else [numpy_helper.from_array(weight, "w")]
    graph = helper.make_graph(nodes, "net", values, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path, save_as_external_data=weight is not None, location="weights.bin", size_threshold=0)
    return path


def test_every_input_is_read_and_drawn(tmp_path):
    inputs = [
        ("pixels", TensorProto.UINT8, ["N", 3, 4, 5]),
        ("image", TensorProto.FLOAT16, ["N", 2]),
        ("tokens", TensorProto.INT64, ["N", 7]),
        ("mask", TensorProto.BOOL, [None, 9]),
    ]
    found = read_inputs(write(tmp_path / "many.onnx", *inputs))
    assert [str(one) for one in found.inputs] == [
        "pixels, uint8 [N, 3, 4, 5]", "image, float16 [N, 2]", "tokens, int64 [N, 7]", "mask, bool [?, 9]",
    ]  # fmt: skip
    assert found.label == "many.onnx" and found.batch is None and found.size == (tmp_path / "many.onnx").stat().st_size
    feed = random_feed(found, 600)
    assert {name: (array.dtype.name, array.shape) for name, array in feed.items()} == {
        "pixels": ("uint8", (600, 3, 4, 5)), "image": ("float16", (600, 2)),
        "tokens": ("int64", (600, 7)), "mask": ("bool", (600, 9)),
    }  # fmt: skip
    assert feed["pixels"].min() == 0 and feed["pixels"].max() == 255
    assert abs(float(feed["image"].mean())) < 0.2 and 0.8 < float(feed["image"].std()) < 1.2  # 1200 normal values
    assert set(feed["tokens"].ravel()) == {0, 1}
    again, other = random_feed(found, 600), random_feed(found, 600, seed=1)
    assert np.array_equal(feed["pixels"], again["pixels"]) and not np.array_equal(feed["pixels"], other["pixels"])


def test_weights_are_no_inputs_and_count_outside_the_file_too(tmp_path):
    path = write(tmp_path / "outside.onnx", ("x", TensorProto.FLOAT, [1, 3]), weight=np.zeros(1000, np.float32))
    proto = onnx.load(path, load_external_data=False)
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [1000]))  # as IR version 3 did
    path.write_bytes(proto.SerializeToString())
    found = read_inputs(path)
    assert [one.name for one in found.inputs] == ["x"]
    assert found.size == path.stat().st_size + (tmp_path / "weights.bin").stat().st_size >= 4000


def test_a_fixed_batch_is_the_only_one(tmp_path):
    found = read_inputs(write(tmp_path / "fixed.onnx", ("image", TensorProto.FLOAT, [4, 3])))
    assert found.batch == 4 and random_feed(found, 4)["image"].shape == (4, 3)
    with pytest.raises(CheckError, match="its batch is fixed at 4 and cannot be 1. Take batch 4, or export the model"):
        random_feed(found, 1)


def test_a_batch_that_no_memory_holds_is_refused(tmp_path):
    found = read_inputs(write(tmp_path / "wide.onnx", ("image", TensorProto.FLOAT, ["N", 1 << 20, 1 << 20])))
    with pytest.raises(CheckError, match="wide.onnx: this machine has no memory for a batch of 8192; take less"):
        random_feed(found, 8192)  # 2^55 bytes: beyond any address space of today


def test_open_axes_are_asked_for(tmp_path):
    found = read_inputs(write(tmp_path / "open.onnx", ("image", TensorProto.FLOAT, ["N", 3, "height", "width"])))
    with pytest.raises(CheckError, match="leaves axes open. Give all .* --shape image=3x224x224"):
        random_feed(found, 2)
    assert random_feed(found, 2, shapes={"image": (3, 8, 6)})["image"].shape == (2, 3, 8, 6)
    for wrong in ((1, 8, 6), (3, 8), (3, 8, 6, 1)):
        with pytest.raises(CheckError, match=f"which {'x'.join(map(str, wrong))} after the batch does not fit"):
            random_feed(found, 2, shapes={"image": wrong})


def test_shapes_are_spelled_one_way():
    assert parse_shape("image=3x224x224") == ("image", (3, 224, 224))
    assert parse_shape("tokens=7") == ("tokens", (7,))
    for wrong in ("3x224x224", "image=", "image=3,224", "image=3x0x2", "=3"):
        with pytest.raises(CheckError, match="is not NAME=AxBxC; for an image of 224x224 write image=3x224x224"):
            parse_shape(wrong)


def test_what_is_no_model_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(CheckError, match="no such file"):
        read_inputs(path)
    for content, message in ((b"nonsense", "not a readable ONNX file"), (b"", "holds no ONNX graph")):
        path.write_bytes(content)
        with pytest.raises(CheckError, match=message):
            read_inputs(path)
    with pytest.raises(CheckError, match="cannot be read"):
        read_inputs(tmp_path)


@pytest.mark.parametrize(
    ("kind", "shape", "message"),
    [
        (TensorProto.STRING, [1], "is of type string; only numbers"),
        (TensorProto.FLOAT, [], "has no axes in the file"),
        (TensorProto.FLOAT, None, "has no axes in the file"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, kind, shape, message):
    with pytest.raises(CheckError, match=f"odd.onnx: input 'x' {message}"):
        read_inputs(write(tmp_path / "odd.onnx", ("x", kind, shape)))


def test_a_model_of_constants_is_refused(tmp_path):
    node = helper.make_node("Constant", [], ["y"], value_float=1.0)
    graph = helper.make_graph([node], "net", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])])
    (tmp_path / "constant.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(CheckError, match="reads no input"):
        read_inputs(tmp_path / "constant.onnx")
