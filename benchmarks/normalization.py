"""What folding a per-channel normalisation into the first convolution costs, before and after QAT.

    python -m benchmarks.normalization --data imagefolder:PATH --out runs/normalization

A network is trained on images normalised channel by channel, with the statistics that torchvision's ImageNet weights
ask for. Folding is exact but where the first convolution reaches into the padding (training/normalization.py says why).
Measured on the test images: the float network; the float network as folded, nothing else changed; quantised at 8 and at
4 bits by calibration alone; and after QAT at 4 bits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "normalization.json"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of torchvision's ImageNet weights, for pixels of 0..1."""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracies by stage."""
    import mecdeploy
    from mecdeploy.training.data import load_dataset
    from mecdeploy.training.run import load_run

    config = mecdeploy.TrainConfig(
        method="lsq",
        seed=arguments.seed,
        data=mecdeploy.DataConfig(name=arguments.data),
        model=mecdeploy.ModelConfig(name="resnet8", mean=MEAN, std=STD),
        quant=mecdeploy.QuantConfig(weight_bits=4, act_bits=4),
        schedule=mecdeploy.ScheduleConfig(fp_epochs=arguments.fp_epochs, epochs=arguments.epochs, frozen_epochs=1),
    )
    folder = arguments.out
    result = mecdeploy.train(config, folder, resume=(folder / "run.toml").exists(), report=_report)
    mecdeploy.export(folder)
    parity = mecdeploy.check(folder)
    run = load_run(folder)
    dataset = load_dataset(config.data, seed=config.seed)
    calibration = next(iter(dataset.train.batches(512, seed=0))).images[0]
    return {
        "images": len(dataset.validation),
        "float": result.accuracy_fp32,
        "float_folded": _folded_accuracy(run, dataset),
        "calibrated_w8a8": _calibrated_accuracy(run, dataset, calibration, 8),
        "calibrated_w4a4": _calibrated_accuracy(run, dataset, calibration, 4),
        "qat_w4a4": result.accuracy,
        "qat_w4a4_onnxruntime": parity.accuracy_onnxruntime,
        "integers_compared": parity.integers_compared,
        "integers_different": parity.integers_different,
    }


def _folded_accuracy(run: Any, dataset: Any) -> float:
    """The float network with its first convolution as quantisation takes it, on pixels of one scale and zero point."""
    import copy

    import torch
    from torch import nn

    from mecdeploy.training.geometry import Geometry, pair, sides
    from mecdeploy.training.input_spec import InputSpec
    from mecdeploy.training.normalization import fold_layer
    from mecdeploy.training.plans import Layer

    spec: InputSpec = run.spec
    model = copy.deepcopy(run.float_model)
    first = model.conv1
    geometry = Geometry(stride=pair(first.stride), padding=sides(first.padding))
    layer = fold_layer(Layer(weight=first.weight.detach(), bias=None, geometry=geometry), spec)
    folded = nn.Conv2d(first.in_channels, first.out_channels, first.kernel_size, first.stride, first.padding)
    with torch.no_grad():
        folded.weight.copy_(layer.weight)
        folded.bias.copy_(layer.bias)
    model.conv1 = folded
    return _accuracy(model, lambda pixels: (pixels.float() - spec.pixel_zero_point) * spec.pixel_scale, dataset)


def _calibrated_accuracy(run: Any, dataset: Any, images: Any, bits: int) -> float:
    """Quantised by calibration alone, on running BatchNorm statistics."""
    import mecdeploy

    quant = mecdeploy.QuantConfig(weight_bits=bits, act_bits=bits)
    model = mecdeploy.prepare(run.float_model, quant, run.spec)
    mecdeploy.calibrate(model, [images])
    return _accuracy(model.eval(), lambda pixels: pixels, dataset)


def _accuracy(model: Any, prepare: Any, dataset: Any) -> float:
    import torch

    right = count = 0
    with torch.no_grad():
        for batch in dataset.validation.batches(500):
            logits = model.eval()(prepare(batch.images[0]))
            right += int((logits.argmax(1) == batch.labels).sum())
            count += len(batch.labels)
    return right / count


def _report(event: Any) -> None:
    if type(event).__name__ == "EpochEvent":
        print(
            f"{event.stage} {event.epoch}/{event.epochs} {event.validation_accuracy:.4f} {event.seconds:.0f} s",
            flush=True,
        )


def main() -> None:
    """Train, or go on, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="imagefolder:PATH")
    parser.add_argument("--data-name", default="CIFAR-10 (JPEG)", help="how the tables call it")
    parser.add_argument("--fp-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=3, help="of quantisation-aware training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/normalization"), help="folder of the run")
    arguments = parser.parse_args()
    import torch

    from benchmarks.environment import describe_environment

    accuracies = measure(arguments)
    result = {
        "environment": describe_environment(seed=arguments.seed, threads=torch.get_num_threads()),
        "data": arguments.data_name,
        "model": "resnet8",
        "fp_epochs": arguments.fp_epochs,
        "epochs": arguments.epochs,
        "images": accuracies.pop("images"),
        "accuracies": accuracies,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
