"""docs/openapi.yaml and the server say the same: addresses, methods, statuses, and every answer by its schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import numpy as np
import openapi_spec_validator
import pytest
import yaml
from starlette.routing import Route

from mecdeploy import __version__
from mecdeploy.serving import tensors

DOCUMENT = yaml.safe_load((Path(__file__).parents[2] / "docs" / "openapi.yaml").read_text(encoding="utf-8"))
REQUEST = {"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, 3, 16, 16], "data": [7] * 768}]}
BINARY = {**REQUEST, "id": "a", "parameters": {"binary_data_output": True}}
Serve = Callable[..., Any]


def test_it_is_an_openapi_document_of_this_version() -> None:
    openapi_spec_validator.validate(DOCUMENT)
    assert DOCUMENT["info"]["version"] == __version__
    assert DOCUMENT["components"]["schemas"]["Datatype"]["enum"] == list(tensors.DTYPES)


def test_it_has_every_address_and_no_other(serve: Serve, photos: Path) -> None:
    routes = {
        (route.path, method)
        for route in serve(f"photos={photos}").app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    documented = {(path, method.upper()) for path, item in DOCUMENT["paths"].items() for method in item} - {
        (path, "PARAMETERS") for path in DOCUMENT["paths"]
    }
    assert {(path, method) for path, method in routes if method != "HEAD"} == documented


@pytest.mark.parametrize(
    ("method", "path", "address", "given", "status"),
    [
        ("get", "/", "/", {}, 200),
        ("get", "/metrics", "/metrics", {}, 200),
        ("get", "/v2", "/v2", {}, 200),
        ("get", "/v2/health/live", "/v2/health/live", {}, 200),
        ("get", "/v2/health/ready", "/v2/health/ready", {}, 200),
        ("post", "/v2/repository/index", "/v2/repository/index", {}, 200),
        ("get", "/v2/models/{model}", "/v2/models/photos", {}, 200),
        ("get", "/v2/models/{model}", "/v2/models/none", {}, 404),
        ("get", "/v2/models/{model}/ready", "/v2/models/photos/ready", {}, 200),
        ("get", "/v2/models/{model}/ready", "/v2/models/none/ready", {}, 404),
        ("get", "/v2/models/{model}/versions/{version}", "/v2/models/photos/versions/{version}", {}, 200),
        ("get", "/v2/models/{model}/versions/{version}", "/v2/models/photos/versions/0", {}, 404),
        ("get", "/v2/models/{model}/versions/{version}/ready", "/v2/models/photos/versions/{version}/ready", {}, 200),
        ("get", "/v2/models/{model}/versions/{version}/ready", "/v2/models/photos/versions/0/ready", {}, 404),
        ("post", "/v2/models/{model}/infer", "/v2/models/photos/infer", {"json": REQUEST}, 200),
        ("post", "/v2/models/{model}/infer", "/v2/models/photos/infer", {"json": BINARY}, 200),
        ("post", "/v2/models/{model}/infer", "/v2/models/photos/infer", {"json": {}}, 400),
        ("post", "/v2/models/{model}/infer", "/v2/models/none/infer", {"json": REQUEST}, 404),
        ("post", "/v2/models/{model}/infer", "/v2/models/photos/infer", {"content": bytes(2_000_000)}, 413),
        (
            *("post", "/v2/models/{model}/infer", "/v2/models/photos/infer"),
            {"json": REQUEST, "headers": {"content-encoding": "gzip"}},
            415,
        ),
        (
            *("post", "/v2/models/{model}/versions/{version}/infer", "/v2/models/photos/versions/{version}/infer"),
            {"json": REQUEST},
            200,
        ),
        ("get", "/v1/models", "/v1/models", {}, 200),
        (
            "post",
            "/v1/models/{model}/classify",
            "/v1/models/photos/classify?top=2",
            {"files": {"image": "PICTURE"}},
            200,
        ),
        ("post", "/v1/models/{model}/classify", "/v1/models/photos/classify", {"files": {"image": b"none"}}, 400),
        ("post", "/v1/models/{model}/classify", "/v1/models/none/classify", {}, 404),
        ("post", "/v1/models/{model}/classify", "/v1/models/photos/classify", {"json": {}}, 415),
    ],
)
def test_answers_are_as_it_says(
    serve: Serve,
    photos: Path,
    picture: bytes,
    method: str,
    path: str,
    address: str,
    given: dict[str, Any],
    status: int,
) -> None:
    client = serve(f"photos={photos}", max_body_mb=1)
    version = client.post("/v2/repository/index").json()[0]["version"]
    if given.get("files") == {"image": "PICTURE"}:
        given = {"files": {"image": picture}}
    response = client.request(method, address.format(version=version), **given)
    assert response.status_code == status, response.text
    require_documented(method, path, response)


def test_refusals_of_a_server_that_is_full_or_ends(serve: Serve, photos: Path) -> None:
    client = serve(f"photos={photos}", max_queue=1)
    service = client.app.state.service
    with service.admit("photos"):
        response = client.post("/v2/models/photos/infer", json=REQUEST)
    assert response.status_code == 429
    require_documented("post", "/v2/models/{model}/infer", response)
    service.draining = True
    for method, path in (("post", "/v2/models/{model}/infer"), ("get", "/v2/health/ready")):
        response = client.request(method, path.format(model="photos"))
        assert response.status_code == 503
        require_documented(method, path, response)


def require_documented(method: str, path: str, response: httpx2.Response) -> None:
    """The status, the content type and the content are among what the document has for this operation."""
    described = resolve(DOCUMENT["paths"][path][method]["responses"][str(response.status_code)])
    media = response.headers["content-type"].partition(";")[0]
    schema = described["content"][media]["schema"]
    content: Any = response.text
    if media == "application/json":
        content = response.json()
    elif media == "application/octet-stream":
        length = int(response.headers["Inference-Header-Content-Length"])
        content, schema = json.loads(response.content[:length]), {"$ref": "#/components/schemas/InferResponse"}
        values = np.frombuffer(response.content[length:], np.float32)
        assert values.nbytes == content["outputs"][0]["parameters"]["binary_data_size"]
    jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(content)


def resolve(entry: dict[str, Any]) -> dict[str, Any]:
    """What a $ref stands for."""
    found: Any = entry
    if "$ref" in entry:
        found = DOCUMENT
        for part in entry["$ref"].removeprefix("#/").split("/"):
            found = found[part]
    return dict(found)
