"""Lets these tests import their own witness, under any pytest import mode; what those of the loop share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def tiny_models(monkeypatch):
    """The loop builds the tiny network, whatever the config names."""
    from tiny_run import build_tiny

    monkeypatch.setattr("mecdeploy.training.state.build_model", build_tiny)
    monkeypatch.setattr("mecdeploy.training.run.build_model", build_tiny)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The default tiny run, never stopped."""
    from tiny_run import build_tiny, tiny_config, tiny_dataset

    from mecdeploy.training.loop import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mecdeploy.training.state.build_model", build_tiny)
        out = tmp_path_factory.mktemp("whole") / "run"
        train(tiny_config(), tiny_dataset(), out)
    return out
