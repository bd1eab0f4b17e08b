"""Where models are found, and a new version taking the place of an old one without a failed request."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from starlette.testclient import TestClient

from mecdeploy.errors import UserError
from mecdeploy.serving.app import build_app
from mecdeploy.serving.config import ServeConfig
from mecdeploy.serving.repository import Slot, Source, find_sources

Serve = Callable[..., TestClient]


def put(model: Path, place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(model, place)
    return place


def test_names_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("cats.onnx", "runs/dogs/model.onnx", "repo/birds/1/model.onnx", "repo/fish/3/model.onnx"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    (tmp_path / "repo" / "empty" / "1").mkdir(parents=True)
    (tmp_path / "repo" / "README").touch()
    monkeypatch.chdir(tmp_path)

    def found(*models: str) -> list[tuple[str, str]]:
        return [(source.name, str(source.path)) for source in find_sources(models)]

    assert found("cats.onnx", "runs/dogs", "pet=cats.onnx") == [
        ("cats", "cats.onnx"),
        ("dogs", "runs/dogs/model.onnx"),
        ("pet", "cats.onnx"),
    ]
    assert found("runs/dogs/model.onnx") == [("dogs", "runs/dogs/model.onnx")]
    assert found("repo") == [("birds", "repo/birds"), ("fish", "repo/fish")]
    assert found("repo/birds", "b=repo/birds") == [("birds", "repo/birds"), ("b", "repo/birds")]
    monkeypatch.chdir(tmp_path / "runs" / "dogs")
    assert found(".") == [("dogs", "model.onnx")]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (("none.onnx",), "none.onnx: no such model file; write one with `mecdeploy export`."),
        (("a b.onnx",), "a model cannot be called 'a b'"),
        (("=cats.onnx",), "a model cannot be called ''"),
        (
            ("cats.onnx", "sub/cats.onnx"),
            "sub/cats.onnx and cats.onnx would both be served as 'cats'; give one another",
        ),
        (("sub",), "sub holds neither model.onnx, nor <number>/model.onnx, nor folders of that kind."),
        (("x=repo",), "repo holds 1 models, with names of their own; leave out x=."),
    ],
)
def test_what_names_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: tuple[str, ...], message: str
) -> None:
    for place in ("cats.onnx", "a b.onnx", "sub/cats.onnx", "repo/birds/1/model.onnx"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        find_sources(models)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": ()}, "there is no model to serve; name at least one file."),
        ({"port": 65536}, "port is 65536; it must be from 0 (any free one) to 65535."),
        ({"max_batch": 0}, "max_batch is 0; it must be a number of at least 1."),
        ({"timeout": float("nan")}, "timeout is nan; it must be a number of at least 0.001."),
        ({"max_delay_ms": float("inf")}, "max_delay_ms is inf; it must be a number of at least 0."),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        ServeConfig(**{"models": ("a",), **settings})
    assert str(error.value) == message


class Looking:
    """A slot, and what it has reported."""

    def __init__(self, path: Path) -> None:
        self.reports: list[str] = []
        self.slot = Slot(Source(name="m", path=path), 1, self.reports.append)

    def look_twice(self) -> str | None:
        """The version that is found once the file has been seen to be at rest."""
        first = self.slot.look()
        model = first or self.slot.look()
        return model.version if model is not None else None


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def test_a_file_that_is_replaced(photos: Path, newer: Path, tmp_path: Path) -> None:
    looking = Looking(put(photos, tmp_path / "m.onnx"))
    assert looking.slot.model.version == digest(photos)
    assert looking.look_twice() is None
    os.replace(put(newer, tmp_path / "next"), tmp_path / "m.onnx")
    assert looking.slot.look() is None  # seen once: it may still be being written
    assert looking.look_twice() == digest(newer)
    (tmp_path / "m.onnx").unlink()
    assert looking.look_twice() is None
    assert looking.reports == ["loaded"]


def test_versions_in_folders(photos: Path, newer: Path, tmp_path: Path) -> None:
    put(photos, tmp_path / "m" / "9" / "model.onnx")
    looking = Looking(tmp_path / "m")
    assert looking.slot.model.version == "9"
    (tmp_path / "m" / "10").mkdir()  # a version that is being written
    assert looking.look_twice() is None
    put(newer, tmp_path / "m" / "10" / "model.onnx")
    assert looking.look_twice() == "10"
    shutil.rmtree(tmp_path / "m" / "10")  # and back
    assert looking.look_twice() == "9"
    assert looking.reports == ["loaded", "loaded"]


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "rows"])
def test_a_broken_version_is_left_alone(photos: Path, newer: Path, tmp_path: Path, damage: str) -> None:
    import onnx
    from onnx import helper

    looking = Looking(put(photos, tmp_path / "m.onnx"))
    content = newer.read_bytes()
    if damage == "rows":  # a file that loads, and fails on its first run
        model = onnx.load(newer)
        shape = helper.make_tensor("bad_shape", onnx.TensorProto.INT64, [2], [7, 5])
        model.graph.initializer.append(shape)
        model.graph.node.append(helper.make_node("Reshape", ["logits", "bad_shape"], ["reshaped"]))
        model.graph.output.append(helper.make_tensor_value_info("reshaped", onnx.TensorProto.FLOAT, [7, 5]))
        content = model.SerializeToString()
    broken = {"empty": b"", "cut": content[:1000], "text": b"no model\n", "rows": content}[damage]
    (tmp_path / "m.onnx").write_bytes(broken)
    assert looking.look_twice() is None and looking.look_twice() is None
    assert looking.reports == ["failed"]
    assert looking.slot.model.version == digest(photos)
    put(newer, tmp_path / "m.onnx")
    assert looking.look_twice() == digest(newer)
    assert looking.reports == ["failed", "loaded"]


def test_no_request_fails_while_versions_change(photos: Path, newer: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    """Eight clients ask without a pause while the file changes six times, once to a broken one; each answer, of eight
    rows, is of one version from its first row to its last, and says so."""
    import httpx2

    place = put(photos, tmp_path / "m.onnx")
    some = pixels[:8]
    answers = {
        digest(path): ort.InferenceSession(path).run(None, {"pixels": some})[0].ravel().tolist()
        for path in (photos, newer)
    }
    entry = {"name": "pixels", "datatype": "UINT8", "shape": list(some.shape), "data": some.ravel().tolist()}
    request = json.dumps({"inputs": [entry]})
    app = build_app(ServeConfig(models=(str(place),), threads=1, reload_seconds=0.01, max_batch=24))
    seen: list[str] = []
    stop = False

    async def client(session: httpx2.AsyncClient) -> None:
        while not stop:
            answer = await session.post("/v2/models/m/infer", content=request)
            assert answer.status_code == 200, answer.text
            version, (output,) = answer.json()["model_version"], answer.json()["outputs"]
            assert output["data"] == answers[version]
            if not seen or seen[-1] != version:
                seen.append(version)

    async def operator() -> None:
        nonlocal stop
        try:
            for number, path in enumerate((newer, photos, newer, None, photos)):
                written = tmp_path / f"next-{number}"
                written.write_bytes(path.read_bytes() if path is not None else b"broken")
                os.replace(written, place)
                expected = digest(path) if path is not None else digest(newer)
                while path is not None and seen[-1:] != [expected]:
                    await asyncio.sleep(0.005)
                while path is None and 'result="failed"} 1.0' not in app.state.service.metrics.exposition().decode():
                    await asyncio.sleep(0.005)
        finally:
            stop = True

    async def all_of_it() -> None:
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://here", timeout=60) as session,
        ):
            await asyncio.gather(operator(), *(client(session) for _ in range(8)))

    asyncio.run(asyncio.wait_for(all_of_it(), 120))
    # A client that was answered by the old version may hear so after another one was answered by the new one.
    assert {digest(photos), digest(newer)} == set(seen)
    exposition = app.state.service.metrics.exposition().decode()
    assert 'mecdeploy_reloads_total{model="m",result="loaded"} 4.0' in exposition
    assert 'mecdeploy_reloads_total{model="m",result="failed"} 1.0' in exposition
    assert f'mecdeploy_model_version{{model="m",version="{digest(photos)}"}} 1.0' in exposition
    assert f'mecdeploy_model_version{{model="m",version="{digest(newer)}"}} 0.0' in exposition
