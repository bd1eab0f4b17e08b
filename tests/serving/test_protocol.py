"""The Open Inference Protocol: right answers, and wrong requests told what is wrong with them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from starlette.testclient import TestClient

Serve = Callable[..., TestClient]
LENGTH = "Inference-Header-Content-Length"


def logits(path: Path, pixels: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(path).run(None, {"pixels": pixels})[0]


def described(pixels: np.ndarray, **changes: Any) -> dict[str, Any]:
    return {"name": "pixels", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.tolist(), **changes}


def test_what_the_server_says_of_itself(serve: Serve, photos: Path) -> None:
    client = serve(f"first={photos}", f"second={photos}")
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data", "model_repository(index)"]
    assert (client.get("/v2/health/live").json(), client.get("/v2/health/ready").json()) == (
        {"live": True},
        {"ready": True},
    )
    metadata = client.get("/v2/models/second").json()
    version = metadata["versions"][0]
    assert metadata == {
        "name": "second",
        "versions": [version],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [-1, 3, 16, 16]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 4]}],
    }
    assert client.get(f"/v2/models/second/versions/{version}").json() == metadata
    assert client.get(f"/v2/models/second/versions/{version}/ready").status_code == 200
    index = client.post("/v2/repository/index").json()
    assert [(entry["name"], entry["state"]) for entry in index] == [("first", "READY"), ("second", "READY")]


@pytest.mark.parametrize("nested", [True, False])
def test_json_tensors(serve: Serve, photos: Path, pixels: np.ndarray, nested: bool) -> None:
    some = pixels[:3]
    data = some.tolist() if nested else some.ravel().tolist()
    answer = serve(photos).post("/v2/models/photos/infer", json={"id": "7", "inputs": [described(some, data=data)]})
    assert answer.status_code == 200
    content = answer.json()
    assert (content["id"], content["model_name"]) == ("7", "photos")
    (output,) = content["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [3, 4])
    found = np.array(output["data"], np.float32).reshape(3, 4)
    np.testing.assert_array_equal(found, logits(photos, some))


def test_binary_tensors(serve: Serve, photos: Path, pixels: np.ndarray) -> None:
    tail = pixels[:2].tobytes()
    entry = {"name": "pixels", "datatype": "UINT8", "shape": [2, 3, 16, 16]}
    entry["parameters"] = {"binary_data_size": len(tail)}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    answer = serve(photos).post("/v2/models/photos/infer", content=head + tail, headers={LENGTH: str(len(head))})
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers[LENGTH])
    (output,) = json.loads(answer.content[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": 32} and "data" not in output
    found = np.array(struct.unpack("<8f", answer.content[length:]), np.float32).reshape(2, 4)
    np.testing.assert_array_equal(found, logits(photos, pixels[:2]))


ONE = [1, 3, 16, 16]
ZEROS = [0] * 768


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "image"}, "there is no input 'image'; the model has 'pixels'."),
        ({"datatype": "FP32"}, "input 'pixels' has datatype 'FP32'; the model reads UINT8."),
        ({"datatype": ["UINT8"]}, "has datatype ['UINT8']; the model reads UINT8."),
        ({"shape": [1, 3, 16, 15]}, "has shape [1, 3, 16, 15]; the model reads [-1, 3, 16, 16]."),
        ({"shape": [-1, 3, 16, 16]}, "has shape [-1, 3, 16, 16]; the model reads [-1, 3, 16, 16]."),
        ({"shape": [0, 3, 16, 16]}, "has shape [0, 3, 16, 16]; the model reads"),
        ({"shape": [10**30, 3, 16, 16]}, f"has shape [{10**30}, 3, 16, 16], but its data has shape [768]."),
        ({"shape": [1] * 5000}, "has shape 5000 dimensions; the model reads"),
        ({"shape": [1, 3, 16, True]}, "needs a shape, a list of integers."),
        ({"shape": "1"}, "needs a shape, a list of integers."),
        ({"data": None}, "needs data, a list of values."),
        ({"data": [0] * 767}, "has shape [1, 3, 16, 16], but its data has shape [767]."),
        ({"data": [[0] * 768]}, "has shape [1, 3, 16, 16], but its data has shape [1, 768]."),
        ({"data": [[0], [0, 1]]}, "has lists of several lengths, or lists beside values."),
        ({"data": [[0], 1]}, "has lists of several lengths, or lists beside values."),
        ({"data": [[[[[[0]]]]]]}, "nested deeper than its shape"),
        ({"data": [*ZEROS[1:], 256]}, "holds a number outside 0 to 255."),
        ({"data": [*ZEROS[1:], -1]}, "holds a number outside 0 to 255."),
        ({"data": [*ZEROS[1:], 10**40]}, "holds a number outside 0 to 255."),
        ({"data": [*ZEROS[1:], 1.0]}, "holds float; UINT8 is int."),
        ({"data": [*ZEROS[2:], "1", None]}, "holds NoneType, str; UINT8 is int."),
        ({"parameters": {"shared_memory_region": "r"}}, "is in shared memory, which this server does not use"),
        ({"parameters": []}, "parameters of input 'pixels' must be a JSON object."),
        ({"parameters": {"binary_data_size": 768}}, "has both data and binary_data_size; give one."),
    ],
)
def test_wrong_inputs(serve: Serve, photos: Path, changes: dict[str, Any], message: str) -> None:
    entry = {"name": "pixels", "datatype": "UINT8", "shape": ONE, "data": ZEROS, **changes}
    answer = serve(photos).post("/v2/models/photos/infer", json={"inputs": [entry]})
    assert answer.status_code == 400
    assert message in answer.json()["error"]


GOOD = {"name": "pixels", "datatype": "UINT8", "shape": ONE, "data": ZEROS}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ([], "the request must be a JSON object."),
        ({}, "the request needs inputs, a list of objects."),
        ({"inputs": []}, "input 'pixels' is missing; the model reads 'pixels'."),
        ({"inputs": [3]}, "each entry of inputs must be a JSON object."),
        ({"inputs": [GOOD, GOOD]}, "input 'pixels' is given twice."),
        ({"inputs": [GOOD], "id": 7}, "the request's id must be a string."),
        ({"inputs": [GOOD], "outputs": [{"name": "x"}]}, "there is no output 'x'; the model has 'logits'."),
        ({"inputs": [GOOD], "outputs": [{"name": "logits"}] * 2}, "output 'logits' is asked for twice."),
        (
            {"inputs": [GOOD], "outputs": [{"name": "logits", "parameters": {"classification": 2}}]},
            "classification is not offered; /v1/models/.../classify names classes.",
        ),
        ({"inputs": [GOOD], "parameters": {"binary_data_output": 1}}, "binary_data_output must be true or false."),
        ({"inputs": [{**GOOD, "shape": [33, 3, 16, 16], "data": [0] * 33 * 768}]}, "33 rows; at most 32"),
    ],
)
def test_wrong_requests(serve: Serve, photos: Path, request_: Any, message: str) -> None:
    answer = serve(photos).post("/v2/models/photos/infer", json=request_)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the request is no JSON"),
        (b"{", "the request is no JSON"),
        (b"\xff\xfe{}", "the request is no JSON"),
        (b'{"inputs": [NaN]}', "the request holds NaN, which is no JSON; tensors must be finite."),
        (b'{"inputs": [-Infinity]}', "the request holds -Infinity"),
        (b"[" * 200_000, "the request is nested too deeply."),
        (b'{"inputs": [' + b"9" * 10_000 + b"]}", "the request is no JSON"),
    ],
)
def test_bodies_that_are_no_json(serve: Serve, photos: Path, body: bytes, message: str) -> None:
    answer = serve(photos).post("/v2/models/photos/infer", content=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


@pytest.mark.parametrize(
    ("size", "length", "message"),
    [
        (768, "-1", "Inference-Header-Content-Length is '-1'; it must be a number of at most"),
        (768, "9999999", "it must be a number of at most"),
        (768, "²", "it must be a number of at most"),
        (768, None, "the request is no JSON"),
        (767, "", "of shape [1, 3, 16, 16] and datatype UINT8 takes 768 bytes; binary_data_size is 767."),
        (769, "", "has binary_data_size 769; 768 bytes follow"),
        (-1, "", "has binary_data_size -1; 768 bytes follow"),
        (768.0, "", "has binary_data_size 768.0; 768 bytes follow"),
    ],
)
def test_wrong_lengths(serve: Serve, photos: Path, size: float, length: str | None, message: str) -> None:
    entry = {"name": "pixels", "datatype": "UINT8", "shape": ONE, "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [entry]}).encode()
    headers = {} if length is None else {LENGTH: length.encode("latin-1") or str(len(head)).encode()}
    answer = serve(photos).post("/v2/models/photos/infer", content=head + bytes(768), headers=headers)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


def test_bytes_that_belong_to_no_input(serve: Serve, photos: Path) -> None:
    head = json.dumps({"inputs": [GOOD]}).encode()
    answer = serve(photos).post("/v2/models/photos/infer", content=head + b"xyz", headers={LENGTH: str(len(head))})
    assert (answer.status_code, answer.json()["error"]) == (400, "3 bytes of the body belong to no input.")


def test_addresses_that_there_are_not(serve: Serve, photos: Path) -> None:
    client = serve(photos)
    for method, path, status, message in (
        ("GET", "/v2/models/dogs", 404, "there is no model 'dogs'; served are photos."),
        ("POST", "/v2/models/dogs/infer", 404, "there is no model 'dogs'; served are photos."),
        ("POST", "/v2/models/photos/versions/9/infer", 404, "model 'photos' has no version '9'; version "),
        ("GET", "/v2/models/photos/infer", 405, "GET /v2/models/photos/infer: Method Not Allowed"),
        ("GET", "/v3", 404, "GET /v3: Not Found"),
        ("GET", "/../../etc/passwd", 404, "Not Found"),
        ("GET", "/v2/models/..%2f..%2fetc%2fpasswd", 404, "Not Found"),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert message in answer.json()["error"]


def foreign(path: Path, rows: int | str, *, type: int = TensorProto.FLOAT, width: int | str = 3) -> Path:
    """A file of other tools: y = x + x, or x where it is no float32."""
    node = helper.make_node("Add", ["x", "x"], ["y"]) if type == TensorProto.FLOAT else None
    graph = helper.make_graph(
        [node or helper.make_node("Identity", ["x"], ["y"])],
        "doubled",
        [helper.make_tensor_value_info("x", type, [rows, width])],
        [helper.make_tensor_value_info("y", type, [rows, width])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("rows", [2, "n"])
def test_files_of_other_tools(serve: Serve, tmp_path: Path, rows: int | str) -> None:
    client = serve(foreign(tmp_path / "doubled.onnx", rows))
    entry = {"name": "x", "datatype": "FP32", "shape": [2, 3], "data": [[1, 2.5, -3], [0.1, 0, 1e30]]}
    answer = client.post("/v2/models/doubled/infer", json={"inputs": [entry]})
    expected = np.array([2, 5, -6, 0.1, 0, 2e30], np.float32) * np.array([1, 1, 1, 2, 1, 1], np.float32)
    assert answer.json()["outputs"][0]["data"] == expected.tolist()
    assert client.get("/v1/models").json() == {"models": []}
    refused = client.post("/v1/models/doubled/classify", content=b"", headers={"content-type": "image/png"})
    assert (refused.status_code, "was not written by `mecdeploy export`" in refused.json()["error"]) == (400, True)
    for value, message in ((1e39, "not finite in FP32"), (10**400, "FP32 cannot hold")):
        wrong = client.post("/v2/models/doubled/infer", json={"inputs": [{**entry, "data": [value] * 6}]})
        assert (wrong.status_code, message in wrong.json()["error"]) == (400, True)
    head = json.dumps({"inputs": [{**entry, "data": None} | {"parameters": {"binary_data_size": 24}}]}).encode()
    head = head.replace(b'"data": null, ', b"")
    tail = np.array([np.nan] * 6, np.float32).tobytes()
    wrong = client.post("/v2/models/doubled/infer", content=head + tail, headers={LENGTH: str(len(head))})
    assert (wrong.status_code, "not finite" in wrong.json()["error"]) == (400, True)


def test_files_of_other_tools_that_cannot_be_served(tmp_path: Path) -> None:
    from mecdeploy.errors import UserError
    from mecdeploy.serving.models import ServedModel

    with pytest.raises(
        UserError, match=r"'x' has shape \['n', 'm'\]; every size must be a number, but for a first one"
    ):
        ServedModel(foreign(tmp_path / "free.onnx", "n", width="m"))
    with pytest.raises(UserError, match=r"'x' is a tensor\(bfloat16\); served are tensor\(bool\), "):
        ServedModel(foreign(tmp_path / "types.onnx", 1, type=TensorProto.BFLOAT16))
