"""Small exported classifiers, and servers in this process and apart."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # so that these tests find the modules beside them in any import mode
from server_process import ServerProcess  # noqa: E402

if TYPE_CHECKING:
    from starlette.testclient import TestClient

CLASSES = ("tabby cat", "dog", "arbre — \N{DECIDUOUS TREE}", "<b>car</b>")


def write_classifier(path: Path, *, seed: int, input: str = "uint8") -> Path:
    """A calibrated W4A4 classifier of 16x16 RGB images, never trained: what is served does not depend on it."""
    import torch
    from torch import nn

    from mecdeploy import InputSpec, QuantConfig, calibrate, export, prepare

    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, len(CLASSES)))
    spec = InputSpec(channels=3, height=16, width=16, pixel_scale=1 / 64, pixel_zero_point=128)
    model = prepare(network, QuantConfig(weight_bits=4, act_bits=4), spec)
    calibrate(model, [torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)])
    return export(model, out=path, input=input, class_names=CLASSES).path


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


def encoded(*, size: tuple[int, int], format: str, mode: str = "RGB", seed: int = 0, **options: Any) -> bytes:
    """A file of smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, format, **options)
    return file.getvalue()


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
