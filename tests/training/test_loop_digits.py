"""The loop on real data and a real network: short, and better than it would be if any stage did nothing."""

import torch

from mecdeploy.training.config import QuantConfig, ScheduleConfig, TrainConfig
from mecdeploy.training.data import load_dataset
from mecdeploy.training.loop import train
from mecdeploy.training.run import load_run


def test_digits_at_two_bits_from_scratch_to_integers(tmp_path):
    config = TrainConfig(
        device="cpu",
        quant=QuantConfig(weight_bits=2, act_bits=2),
        schedule=ScheduleConfig(fp_epochs=4, epochs=3, frozen_epochs=1, batch_size=64, calibration_images=128),
    )
    dataset = load_dataset(config.data, seed=config.seed)
    result = train(config, dataset, tmp_path / "run")
    assert [event.stage for event in result.history] == ["fp32"] * 4 + ["qat"] * 2 + ["deploy"]
    assert result.accuracy_fp32 > 0.9  # ten classes: chance is 0.1
    assert result.accuracy > 0.8
    run = load_run(tmp_path / "run")
    images, labels = dataset.validation.arrays()
    logits = run.model.integers(torch.from_numpy(images))["logits"]
    assert (logits.argmax(1) == labels).mean() == result.accuracy
