"""Accuracy: fp32, then LSQ and MEC-Quant from that checkpoint with the same budget, each file exported and checked.

    python -m benchmarks.cifar10 --data imagefolder:PATH --out runs/cifar10

PATH holds train/<class>/* and test/<class>/*. The test part is read after every epoch for the record only: no epoch, no
setting and no run is chosen by it, and the accuracy of a run is that of its last epoch. A run that is done is skipped,
one that was stopped goes on, so the same command again finishes what is left.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "cifar10.json"
FINAL = "checkpoint-final.safetensors"
METHODS = ("lsq", "mec")
WIDTHS = (4, 2)


def plan(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name of each run -> what it changes in the config, in the order in which they must run."""
    runs: dict[str, dict[str, Any]] = {
        "fp32": {"method": "fp32", "bits": 8, "weights": "", "fp_epochs": arguments.fp_epochs}
    }
    for bits in WIDTHS:
        for method in METHODS:
            weights = str(arguments.out / "fp32" / FINAL)
            runs[f"{method}-w{bits}a{bits}"] = {"method": method, "bits": bits, "weights": weights, "fp_epochs": 0}
    return runs


def run_config(arguments: argparse.Namespace, change: dict[str, Any]) -> Any:
    """The TrainConfig of one run: defaults, but for what the command line and the plan say."""
    import mecdeploy

    return mecdeploy.TrainConfig(
        method=change["method"],
        seed=arguments.seed,
        device=arguments.device,
        weights=change["weights"],
        data=mecdeploy.DataConfig(name=arguments.data),
        model=mecdeploy.ModelConfig(name=arguments.model),
        quant=mecdeploy.QuantConfig(weight_bits=change["bits"], act_bits=change["bits"]),
        schedule=mecdeploy.ScheduleConfig(
            fp_epochs=change["fp_epochs"],
            epochs=arguments.epochs,
            frozen_epochs=min(arguments.frozen_epochs, arguments.epochs),
            batch_size=arguments.batch_size,
            fp_learning_rate=arguments.fp_learning_rate,
            learning_rate=arguments.learning_rate,
        ),
    )


def execute(folder: Path, config: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """Train, export and check one run, or read what it came to when it is done."""
    import mecdeploy

    done = folder / "benchmark.json"
    if done.exists():
        record: dict[str, Any] = json.loads(done.read_text())
        if record["config"] != comparable(config):
            raise SystemExit(f"{folder} holds a run with other settings; choose another --out.")
        return record
    start = time.monotonic()
    trained = mecdeploy.train(config, folder, resume=(folder / "run.toml").exists(), report=reporter(folder.name, say))
    epochs = trained.history
    record = {
        "method": config.method,
        "accuracy_torch": trained.accuracy,
        "accuracy_by_epoch": [round(event.validation_accuracy, 4) for event in epochs],
        "seconds_per_epoch": round(sorted(event.seconds for event in epochs)[len(epochs) // 2], 1),
    }
    if config.method == "fp32":
        record["file_bytes"] = float_bytes(folder, config)
    else:
        record |= deployed(folder)
    # Of this session alone, where a run was stopped and went on.
    record |= {"seconds": round(time.monotonic() - start, 1), "config": comparable(config)}
    done.write_text(json.dumps(record, indent=2) + "\n")
    return record


def deployed(folder: Path) -> dict[str, Any]:
    """Export the run, check the file on every validation image, and keep the findings that matter here."""
    import mecdeploy

    exported = mecdeploy.export(folder)
    parity = mecdeploy.check(folder)
    keys = (
        "passed",
        "integers_compared",
        "integers_different",
        "top1_agreement",
        "accuracy_torch",
        "accuracy_onnxruntime",
        "max_logit_difference",
        "float_convolutions",
        "failures",
    )
    return {"file_bytes": exported.size} | {key: getattr(parity, key) for key in keys}


def float_bytes(folder: Path, config: Any) -> int:
    """Size of the trained network as an fp32 ONNX file."""
    from mecdeploy.float_baseline import float_onnx
    from mecdeploy.training.checkpoint import read_header
    from mecdeploy.training.initial import load_initial_weights
    from mecdeploy.training.models import build_model

    header = read_header(folder / FINAL)
    spec = {key: header["input"][key] for key in ("channels", "height", "width")}
    model = build_model(config.network, num_classes=len(header["class_names"]), **spec)
    load_initial_weights(model, folder / FINAL)
    return len(float_onnx(model.eval(), **spec))


def comparable(config: Any) -> dict[str, Any]:
    """The config without where things lie on this machine."""
    described: dict[str, Any] = config.describe()
    described["weights"] = Path(described["weights"]).name
    described["data"].pop("root")
    described["data"]["name"] = described["data"]["name"].partition(":")[0]
    return described


def reporter(name: str, say: Callable[[str], None]) -> Callable[[Any], None]:
    """One line per epoch."""

    def report(event: Any) -> None:
        if type(event).__name__ == "EpochEvent":
            say(
                f"{name}: {event.stage} {event.epoch}/{event.epochs} loss {event.loss:.4f} train "
                f"{event.train_accuracy:.4f} validation {event.validation_accuracy:.4f} {event.seconds:.0f} s"
            )

    return report


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="imagefolder:PATH")
    parser.add_argument("--data-name", default="CIFAR-10 (JPEG)", help="how the tables call it")
    parser.add_argument("--note", default="", help="a sentence for the result file")
    parser.add_argument("--model", default="resnet8", choices=("resnet8", "resnet20", "resnet18"))
    parser.add_argument("--fp-epochs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=4, help="of quantisation-aware training, each run")
    parser.add_argument("--frozen-epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--fp-learning-rate", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves it the choice")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"), help="folder of the runs")
    parser.add_argument("--result", type=Path, default=RESULT)
    return parser.parse_args(argv)


def main() -> None:
    """Run what is left, then write the result file."""
    arguments = parse()
    import torch

    from benchmarks.environment import describe_environment

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = "cuda" if arguments.device != "cpu" and torch.cuda.is_available() else "cpu"

    def say(line: str) -> None:
        print(line, flush=True)

    records = {}
    for name, change in plan(arguments).items():
        records[name] = execute(arguments.out / name, run_config(arguments, change), say)
        say(f"{name}: {json.dumps({key: value for key, value in records[name].items() if key != 'config'})}")
    result = {
        "environment": describe_environment(seed=arguments.seed, threads=torch.get_num_threads(), device=device),
        "data": arguments.data_name,
        "model": arguments.model,
        "fp_epochs": arguments.fp_epochs,
        "epochs": arguments.epochs,
        "note": arguments.note,
        "runs": records,
    }
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
