"""Full-precision networks trained once, from which every setting of the matrix starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mecdeploy import ModelConfig, ScheduleConfig, TrainConfig, train

sys.path.insert(0, str(Path(__file__).parent))  # so that these tests find their own modules under any import mode


@pytest.fixture(scope="session")
def resnet8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of resnet8 on the digits, three epochs old."""
    out = tmp_path_factory.mktemp("float") / "resnet8"
    schedule = ScheduleConfig(fp_epochs=3, epochs=0, frozen_epochs=0, batch_size=64)
    config = TrainConfig(method="fp32", device="cpu", model=ModelConfig(name="resnet8"), schedule=schedule)
    return train(config, out).checkpoint
