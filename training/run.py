"""A finished run, read back: what export and check start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mecdeploy.training.checkpoint import FINAL, Checkpoint, Position, file_sha256, read_checkpoint
from mecdeploy.training.config import TrainConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import ACCURACY
from mecdeploy.training.initial import load_tensors
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.models import build_model
from mecdeploy.training.names import user_file
from mecdeploy.training.preparation import prepare
from mecdeploy.training.retention import CheckpointFolder


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A finished run on the CPU, both networks in evaluation mode.

    model: the quantised network. float_model: the full-precision one it came from; reads spec.normalize(pixels).
    checkpoint, sha256: the file and the digest of its bytes. metrics: "accuracy_fp32" and "accuracy_quantized" over the
    validation images (0..1), "measure", what these two are (ACCURACY or AGREEMENT), and "history", one mapping per
    epoch with the fields of EpochEvent.
    """

    model: QuantizedModel
    float_model: nn.Module
    config: TrainConfig
    class_names: tuple[str, ...]
    spec: InputSpec
    checkpoint: Path
    sha256: str
    metrics: Mapping[str, Any]


def load_run(out: Path, *, model_name: str = "") -> LoadedRun:
    """Read the final checkpoint of the run in `out`. Published weights are not fetched again.

    model_name: "path/to/file.py:factory" of a network of the user's, from somebody who may have it executed (the run's
    run.toml, not its checkpoint). Without it, a checkpoint that names a file is refused.
    Raises TrainingError when there is no run, when it has not finished (saying how far it is), when it was trained with
    method "fp32" and so has nothing quantised, and when the checkpoint is truncated, damaged or not ours.
    """
    path = out / FINAL
    if not path.exists():
        raise _unfinished(out)
    checkpoint = read_checkpoint(path)
    header = checkpoint.header
    config = _trusted(_config(header["config"], path), model_name, path)
    if config.method == "fp32":
        raise TrainingError(
            f"{out} was trained with method fp32, so it holds no quantised network. "
            f"Train another run with method mec or lsq and weights {path}."
        )
    spec = InputSpec(**header["input"])
    float_model, model = _networks(checkpoint, config, spec, path)
    return LoadedRun(
        model=model,
        float_model=float_model,
        config=config,
        class_names=tuple(header["class_names"]),
        spec=spec,
        checkpoint=path,
        sha256=file_sha256(path),
        metrics={
            "accuracy_fp32": header["accuracy_fp32"],
            "accuracy_quantized": header["accuracy"],
            "measure": header.get("measure", ACCURACY),
            "history": header["history"],
        },
    )


def _networks(
    checkpoint: Checkpoint, config: TrainConfig, spec: InputSpec, path: Path
) -> tuple[nn.Module, QuantizedModel]:
    classes = len(checkpoint.header["class_names"])
    float_model = build_model(
        config.network, num_classes=classes, channels=spec.channels, height=spec.height, width=spec.width
    )
    try:
        load_tensors(float_model, checkpoint.section("float"))
        model = prepare(float_model, config.quant, spec, config.method)
        model.load_state_dict(checkpoint.section("model"))
    except RuntimeError as error:
        raise TrainingError(
            f"{path} does not fit this version's {config.model.name} ({str(error).splitlines()[0]}). "
            "Use the version that trained it."
        ) from error
    return float_model.eval(), model.eval()


def _config(described: Mapping[str, Any], path: Path) -> TrainConfig:
    try:
        return TrainConfig.from_description(described)
    except TypeError as error:
        raise TrainingError(f"{path} was written by another version: its config does not fit ({error}).") from error


def _trusted(config: TrainConfig, model_name: str, path: Path) -> TrainConfig:
    """The config, with the file that makes its network taken from `model_name` instead of the checkpoint."""
    if user_file(config.model.name) is None:
        return config
    if user_file(model_name) is None:
        raise TrainingError(
            f"{path} names {config.model.name} as its network, and a checkpoint alone may not have code executed. "
            "Give model_name, or model.name in run.toml, as path/to/file.py:factory."
        )
    return replace(config, model=replace(config.model, name=model_name))


def _unfinished(out: Path) -> TrainingError:
    position: Position | None = CheckpointFolder(out).newest()
    if position is None:
        return TrainingError(f"{out} holds no checkpoint; give the folder of a finished run.")
    return TrainingError(
        f"{out} has not finished: it stands after {position.epoch} epochs and {position.step} steps of stage "
        f"{position.stage}. Resume it (train with resume, or mecdeploy train --out {out} --resume)."
    )
