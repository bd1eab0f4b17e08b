"""Small exported classifiers, and servers in this process and apart."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # so that these tests find the modules beside them in any import mode
from server_process import ServerProcess  # noqa: E402
from serving_models import encoded, write_classifier  # noqa: E402

if TYPE_CHECKING:
    from starlette.testclient import TestClient


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file; tests only read it."""
    return write_classifier(tmp_path_factory.mktemp("served") / "photos.onnx", seed=0)


@pytest.fixture(scope="session")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another network in the place of `photos`."""
    return write_classifier(tmp_path_factory.mktemp("served") / "newer.onnx", seed=1)


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    """Forty images as the network reads them."""
    return np.random.default_rng(0).integers(0, 256, (40, 3, 16, 16), dtype=np.uint8)


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A JPEG file that has to be resized and cropped."""
    return encoded(size=(61, 40), format="JPEG")


@pytest.fixture
def serve() -> Iterator[Callable[..., TestClient]]:
    """A server in this process: serve("name=path", max_batch=4) -> its client."""
    from starlette.testclient import TestClient

    from mecdeploy.serving.app import build_app
    from mecdeploy.serving.config import ServeConfig

    with ExitStack() as stack:

        def start(*models: str | Path, **settings: Any) -> TestClient:
            config = ServeConfig(models=tuple(map(str, models)), threads=1, **{"reload_seconds": 0, **settings})
            return stack.enter_context(TestClient(build_app(config), raise_server_exceptions=False))

        yield start


@pytest.fixture
def serve_apart(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """A server process: serve_apart(path, "--workers", 2) -> ServerProcess, which answers."""
    with ExitStack() as stack:

        def start(*arguments: object) -> ServerProcess:
            return stack.enter_context(ServerProcess([str(argument) for argument in arguments], tmp_path))

        yield start
