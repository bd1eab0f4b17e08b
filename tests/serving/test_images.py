"""Images in, classes out: what `mecdeploy predict` says of the same file, to the last bit; hostile files refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image
from serving_models import CLASSES, encoded, write_classifier
from starlette.testclient import TestClient

Serve = Callable[..., TestClient]
CLASSIFY = "/v1/models/photos/classify"


@pytest.mark.parametrize(
    ("size", "format", "mode"),
    [
        ((16, 16), "PNG", "RGB"),
        ((61, 40), "JPEG", "RGB"),
        ((40, 61), "PNG", "RGBA"),
        ((50, 50), "JPEG", "L"),
        ((9, 30), "PNG", "P"),
    ],
)
def test_answers_are_those_of_predict(
    serve: Serve, photos: Path, tmp_path: Path, size: tuple[int, int], format: str, mode: str
) -> None:
    from mecdeploy.prediction import predict
    from mecdeploy.training.data import decode_image

    content = encoded(size=size, format=format, mode=mode)
    file = tmp_path / "file"
    file.write_bytes(content)
    answer = serve(photos).post(
        CLASSIFY, params={"top": 4}, content=content, headers={"content-type": f"image/{format.lower()}"}
    )
    assert answer.status_code == 200
    found = {entry["class"]: entry["probability"] for entry in answer.json()["classes"]}
    assert list(found.items()) == predict(photos, [file])[0].top(4)
    # The witness: training's own decoder, a plain session, a softmax by another formula, so up to float64's rounding.
    pixels = decode_image(file, channels=3, height=16, width=16)[np.newaxis]
    logits = ort.InferenceSession(photos).run(None, {"pixels": pixels})[0][0].astype(np.float64)
    expected = 1 / np.exp(logits[np.newaxis] - logits[:, np.newaxis]).sum(1)
    np.testing.assert_allclose([found[name] for name in CLASSES], expected, rtol=1e-12)


def test_a_picture_on_its_side_stays_so_as_in_predict(serve: Serve, photos: Path, tmp_path: Path) -> None:
    from mecdeploy.prediction import predict

    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned by 90 degrees for a viewer
    content = encoded(size=(61, 40), format="JPEG", exif=turned)
    (tmp_path / "turned.jpg").write_bytes(content)
    answer = serve(photos).post(CLASSIFY, params={"top": 1}, content=content, headers={"content-type": "image/jpeg"})
    (best,) = answer.json()["classes"]
    assert [(best["class"], best["probability"])] == predict(photos, [tmp_path / "turned.jpg"])[0].top(1)


def test_a_form_is_as_good_as_a_body(serve: Serve, photos: Path, picture: bytes) -> None:
    client = serve(photos)
    plain = client.post(CLASSIFY, content=picture, headers={"content-type": "image/jpeg"})
    form = client.post(CLASSIFY, files={"image": ("cat.jpg", picture, "image/jpeg")}, data={"note": "ignored"})
    assert plain.status_code == 200 and plain.json() == form.json()
    assert len(plain.json()["classes"]) == 4  # five are asked for, and there are four


def test_a_float_input_takes_images_too(serve: Serve, tmp_path: Path, picture: bytes) -> None:
    from mecdeploy.prediction import predict

    model = write_classifier(tmp_path / "float.onnx", seed=2, input="float")
    (tmp_path / "picture.jpg").write_bytes(picture)
    answer = serve(model).post("/v1/models/float/classify", content=picture, headers={"content-type": "image/jpeg"})
    found = [(entry["class"], entry["probability"]) for entry in answer.json()["classes"]]
    assert found == predict(model, [tmp_path / "picture.jpg"])[0].top(5)


def gif() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "GIF")
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A small file that says it is a big picture: the header is right, the pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"", 400, "the image is not an image that is read here (JPEG or PNG)."),
        (b"no picture", 400, "the image is not an image that is read here (JPEG or PNG)."),
        (gif(), 400, "the image is not an image that is read here (JPEG or PNG)."),
        (encoded(size=(61, 40), format="JPEG")[:300], 400, "the image cannot be read ("),
        (encoded(size=(61, 40), format="PNG")[:60], 400, "the image cannot be read ("),
        (png_of(8000, 8000), 413, "the image has 8000 x 8000 pixels; at most 50,000,000 in all are decoded."),
        (png_of(60_000, 60_000), 413, "the image cannot be read (Image size (3600000000 pixels) exceeds limit"),
        (encoded(size=(20_000, 1), format="PNG"), 413, "too narrow for an input of 16 x 16"),
    ],
)
def test_what_is_no_image(serve: Serve, photos: Path, content: bytes, status: int, message: str) -> None:
    limits = {"max_megapixels": 5} if b"too narrow" in message.encode() else {}
    answer = serve(photos, **limits).post(CLASSIFY, content=content, headers={"content-type": "image/png"})
    assert answer.status_code == status
    assert message in answer.json()["error"]


def test_what_a_request_may_be(serve: Serve, photos: Path, picture: bytes) -> None:
    client = serve(photos, max_body_mb=0.01)
    for arguments, status, message in (
        ({"content": picture, "headers": {"content-type": "text/plain"}}, 415, "content type is 'text/plain'; send"),
        ({"content": picture, "params": {"top": "0"}}, 400, "top is '0'; it must be a number of at least 1."),
        ({"content": picture, "params": {"top": "x"}}, 400, "top is 'x'"),
        ({"files": {"picture": ("a.jpg", picture)}}, 400, "the form needs one file called 'image'"),
        ({"data": {"image": "text"}, "files": {"b": ("b", b"")}}, 400, "the form needs one file called 'image'"),
        ({"files": [("image", ("a", picture)), ("image", ("b", picture))]}, 400, "Too many files"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "Missing boundary"),
        ({"content": bytes(10_001)}, 413, "the body has more than 10000 bytes, which are the most that are read."),
        ({"content": iter([bytes(9_000), bytes(9_000)])}, 413, "the body has more than 10000 bytes"),
        ({"content": picture, "headers": {"content-encoding": "gzip"}}, 415, "the body is encoded ('gzip')"),
    ):
        if "content" in arguments:
            arguments["headers"] = {"content-type": "image/jpeg", **arguments.get("headers", {})}
        answer = client.post(CLASSIFY, **arguments)
        assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text
