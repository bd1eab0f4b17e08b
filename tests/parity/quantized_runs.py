"""Settings for runs that quantise a network trained before, in a second or two."""

from __future__ import annotations

from pathlib import Path

from mecdeploy import DataConfig, ModelConfig, QuantConfig, ScheduleConfig, TrainConfig

ONE_EPOCH = ScheduleConfig(fp_epochs=0, epochs=1, frozen_epochs=1, batch_size=64, calibration_images=128)


def quantized_config(checkpoint: Path, weight_bits: int, act_bits: int, *, method: str = "mec") -> TrainConfig:
    """One epoch of QAT from that checkpoint, all of it in the frozen phase."""
    return TrainConfig(
        method=method,
        device="cpu",
        weights=str(checkpoint),
        data=DataConfig(name="digits"),
        model=ModelConfig(name="resnet8"),
        quant=QuantConfig(weight_bits=weight_bits, act_bits=act_bits),
        schedule=ONE_EPOCH,
    )
