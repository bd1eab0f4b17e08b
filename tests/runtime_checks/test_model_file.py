"""Files that are not ours, not whole or not there: one line, with the next step."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from qdq_models import images, residual_network

from mecdeploy.runtime_checks import CheckError, check_model, read_model


def complaint(source):
    with pytest.raises(CheckError) as caught:
        read_model(source)
    message = str(caught.value)
    assert "\n" not in message
    assert any(step in message for step in ("Export", "export", "Check"))
    return message


@pytest.fixture(scope="module")
def data():
    return residual_network().SerializeToString()


def with_metadata(data, key, value):
    model = onnx.ModelProto.FromString(data)
    if value is not None and key not in (prop.key.removeprefix("mecdeploy.") for prop in model.metadata_props):
        model.metadata_props.add(key=f"mecdeploy.{key}", value=value)
    for prop in list(model.metadata_props):
        if prop.key == f"mecdeploy.{key}":
            if value is None:
                model.metadata_props.remove(prop)
            else:
                prop.value = value
    return model.SerializeToString()


def test_missing_file(tmp_path):
    assert "gone.onnx: no such file" in complaint(tmp_path / "gone.onnx")


def test_folder_in_place_of_a_file(tmp_path):
    assert "cannot be read" in complaint(tmp_path)


def test_empty_file(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "model.onnx: the file is empty" in complaint(tmp_path / "model.onnx")


def test_something_else(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    assert "model.onnx: not a readable ONNX file" in complaint(tmp_path / "model.onnx")


def test_someone_elses_model():
    node = helper.make_node("Relu", ["x"], ["y"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:]))
    assert "carries no mecdeploy metadata" in complaint(model.SerializeToString())


def test_every_truncation_is_refused(data):
    """Cut anywhere, at field boundaries too, no prefix of a file is taken for a model."""
    cuts = {*range(0, len(data), 97), *range(len(data) - 200, len(data))}
    for cut in sorted(cuts):
        complaint(data[:cut])


@pytest.mark.parametrize(
    "key", ["format", "weight_bits", "trained_bits", "activation_bits", "units", "input", "target"]
)
def test_missing_metadata(data, key):
    assert f"metadata mecdeploy.{key} is missing" in complaint(with_metadata(data, key, None))


def test_a_format_of_the_future(data):
    assert "metadata format is '2'; this version reads '1'" in complaint(with_metadata(data, "format", "2"))


@pytest.mark.parametrize("key, value", [("units", "{}"), ("weight_bits", "[1"), ("input", '"RGB"')])
def test_metadata_of_another_kind(data, key, value):
    assert f"metadata mecdeploy.{key} is not a JSON" in complaint(with_metadata(data, key, value))


def test_islands_are_optional_metadata(data):
    file = read_model(data)
    assert (file.float_values, dict(file.islands)) == ((), {})
    described = {"norm": {"operators": ["layer_norm"], "reason": "no integer kernel"}}
    with_islands = with_metadata(
        with_metadata(data, "float_values", '["norm/codes"]'), "islands", json.dumps(described)
    )
    file = read_model(with_islands)
    assert file.float_values == ("norm/codes",)
    assert (file.islands["norm"].operators, file.islands["norm"].reason) == (("layer_norm",), "no integer kernel")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("float_values", "{}", "metadata mecdeploy.float_values is not a JSON list"),
        ("islands", "[]", "metadata mecdeploy.islands is not a JSON dict"),
        ("islands", '{"norm": []}', "metadata mecdeploy.islands has no operators or no reason for 'norm'"),
        ("islands", '{"norm": {"operators": "x", "reason": ""}}', "has no operators or no reason for 'norm'"),
        ("islands", '{"norm": {"operators": []}}', "has no operators or no reason for 'norm'"),
    ],
)
def test_metadata_of_islands_of_another_kind(data, key, value, message):
    assert message in complaint(with_metadata(data, key, value))


def test_an_input_that_is_not_the_promised_one(data):
    described = {"dtype": "float32", "channels": 3, "height": 13, "width": 11}
    assert "does not have one float32 input" in complaint(with_metadata(data, "input", json.dumps(described)))
    described["dtype"] = "bfloat16"
    assert "input dtype 'bfloat16'" in complaint(with_metadata(data, "input", json.dumps(described)))
    del described["height"]
    assert "has no integer height" in complaint(with_metadata(data, "input", json.dumps(described)))


def test_another_output_than_logits():
    model = residual_network()
    model.graph.output[0].name = "stem"
    assert "only output is not 'logits'" in complaint(model.SerializeToString())


def test_a_graph_that_is_no_valid_onnx():
    model = residual_network()
    model.graph.node[0].input[0] = "nothing writes this"
    assert "not a valid ONNX model" in complaint(model.SerializeToString())


def test_an_opset_onnxruntime_does_not_know():
    model = residual_network()
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    with pytest.raises(CheckError, match="onnxruntime refuses the model|no arithmetic"):
        check_model(model.SerializeToString(), images(0, 2), np.zeros(2, np.int64), None)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((2, 3, 13, 12), np.uint8),
        np.zeros((2, 3, 13, 11), np.float32),
        np.zeros((3, 13, 11), np.uint8),
    ],
)
def test_images_of_another_shape(data, pixels):
    with pytest.raises(CheckError, match=r"reads uint8 \[n, 3, 13, 11\]. Pass images of that shape"):
        check_model(data, pixels, np.zeros(2, np.int64), None)


@pytest.mark.parametrize("labels", [np.zeros(3, np.int64), np.zeros((2, 1), np.int64)])
def test_labels_of_another_number(data, labels):
    with pytest.raises(CheckError, match="2 images and labels"):
        check_model(data, images(0, 2), labels, None)


def test_no_images(data):
    with pytest.raises(CheckError, match="0 images"):
        check_model(data, images(0, 0), np.zeros(0, np.int64), None)
