"""Full-precision networks trained once, from which every setting of the matrix starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from mecdeploy import DataConfig, ModelConfig, QuantConfig, ScheduleConfig, TrainConfig, train

ONE_EPOCH = ScheduleConfig(fp_epochs=0, epochs=1, frozen_epochs=1, batch_size=64, calibration_images=128)


@pytest.fixture(scope="session")
def resnet8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of resnet8 on the digits, three epochs old."""
    out = tmp_path_factory.mktemp("float") / "resnet8"
    schedule = ScheduleConfig(fp_epochs=3, epochs=0, frozen_epochs=0, batch_size=64)
    config = TrainConfig(method="fp32", device="cpu", model=ModelConfig(name="resnet8"), schedule=schedule)
    return train(config, out).checkpoint


def quantized_config(checkpoint: Path, weight_bits: int, act_bits: int, *, method: str = "mec") -> TrainConfig:
    """One epoch of QAT from that checkpoint, all of it in the frozen phase."""
    return TrainConfig(
        method=method,
        device="cpu",
        init=str(checkpoint),
        data=DataConfig(name="digits"),
        model=ModelConfig(name="resnet8"),
        quant=QuantConfig(weight_bits=weight_bits, act_bits=act_bits),
        schedule=ONE_EPOCH,
    )
