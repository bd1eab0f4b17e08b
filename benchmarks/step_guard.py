"""What the guard of the step sizes is for: QAT at learning rates from usual to far too high, with it and without.

    python -m benchmarks.step_guard

Two networks on scikit-learn's digits: resnet8, and a small one whose logits end in a pool (so that their 8-bit step
size is learned, too). Each is trained in full precision once for every seed, then quantised at each rate and width.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

RESULT = Path(__file__).parent / "results" / "step_guard.json"
NETWORKS = {"resnet8": "resnet8", "pooled": f"{Path(__file__).resolve()}:PooledLogits"}
RATES = (0.02, 0.1, 0.3, 1.0)
WIDTHS = (2, 4)
SEEDS = (0, 1, 2)
FP_EPOCHS, EPOCHS, BATCH = 4, 4, 64


class PooledLogits(nn.Module):
    """Three convolutions, the last of which makes a map for each class, and the mean of each map."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, num_classes, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to logits [N, num_classes]."""
        logits: Tensor = self.body(x)
        return logits


@contextmanager
def guard(active: bool) -> Iterator[None]:
    """With active=False, step sizes are updated as any other parameter."""
    from mecdeploy.training.optimizers import GuardedSGD

    if active:
        yield
    else:
        with mock.patch.object(GuardedSGD, "step", torch.optim.SGD.step):
            yield


def quantise(weights: Path, folder: Path, *, network: str, bits: int, rate: float, seed: int) -> dict[str, Any]:
    """One QAT run: its accuracy, how many step sizes ended at the floor, and whether the result can be exported."""
    import mecdeploy
    from mecdeploy.export import ExportError
    from mecdeploy.training.errors import TrainingError
    from mecdeploy.training.quantizers import SMALLEST_STEP
    from mecdeploy.training.run import load_run

    config = mecdeploy.TrainConfig(
        method="lsq",
        seed=seed,
        device="cpu",
        weights=str(weights),
        model=mecdeploy.ModelConfig(name=NETWORKS[network]),
        quant=mecdeploy.QuantConfig(weight_bits=bits, act_bits=bits),
        schedule=mecdeploy.ScheduleConfig(
            fp_epochs=0, epochs=EPOCHS, frozen_epochs=1, batch_size=BATCH, learning_rate=rate
        ),
    )
    try:
        accuracy = mecdeploy.train(config, folder).accuracy
    except TrainingError as error:
        return {"stopped": str(error).partition(":")[0]}
    steps = load_run(folder, model_name=NETWORKS[network]).model.step_sizes()
    collapsed = sum(int((step <= SMALLEST_STEP).sum()) for step in steps)
    try:
        mecdeploy.export(folder)
    except ExportError as error:
        return {"accuracy": accuracy, "collapsed": collapsed, "refused": str(error)}
    return {"accuracy": accuracy, "collapsed": collapsed}


def main() -> None:
    """Train everything and write the result file."""
    from benchmarks.environment import describe_environment

    torch.set_num_threads(1)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for network in NETWORKS:
            for seed in SEEDS:
                trained = _full_precision(Path(folder), network, seed)
                for bits in WIDTHS:
                    for rate in RATES:
                        for guarded in (False, True):
                            out = Path(folder) / f"{network}-{seed}-{bits}-{rate}-{guarded}"
                            with guard(guarded):
                                found = quantise(trained, out, network=network, bits=bits, rate=rate, seed=seed)
                            settings = {"network": network, "seed": seed, "bits": bits, "rate": rate}
                            runs.append({**settings, "guarded": guarded, **found})
                            print(json.dumps(runs[-1]), flush=True)
    environment = describe_environment(seed=SEEDS[0], threads=1)
    lines = ",\n".join(f"  {json.dumps(run)}" for run in runs)
    settings = {"fp_epochs": FP_EPOCHS, "epochs": EPOCHS, "batch_size": BATCH, "seeds": list(SEEDS)}
    head = json.dumps({"environment": environment, **settings}, indent=2).removesuffix("\n}")
    RESULT.write_text(f'{head},\n  "runs": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


def _full_precision(folder: Path, network: str, seed: int) -> Path:
    import mecdeploy

    config = mecdeploy.TrainConfig(
        method="fp32",
        seed=seed,
        device="cpu",
        model=mecdeploy.ModelConfig(name=NETWORKS[network]),
        schedule=mecdeploy.ScheduleConfig(fp_epochs=FP_EPOCHS, batch_size=BATCH),
    )
    return mecdeploy.train(config, folder / f"{network}-{seed}").checkpoint


if __name__ == "__main__":
    main()
