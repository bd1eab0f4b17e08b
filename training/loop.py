"""train: full precision, calibration, quantisation-aware training, the frozen final phase.

A run can stop after any step and go on, on a CPU bit for bit, because nothing random has a state: every seed is derived
from (seed, stage, epoch, step), and the learning rate is a function of the position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mecdeploy.training.checkpoint import FINAL, read_header
from mecdeploy.training.config import TrainConfig
from mecdeploy.training.data import ImageDataset
from mecdeploy.training.device import choose_device, reproducible
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import EpochEvent, Event
from mecdeploy.training.interrupt import Interrupts
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.retention import CheckpointFolder
from mecdeploy.training.session import Session
from mecdeploy.training.state import State


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run.

    accuracy_fp32, accuracy: of the full-precision and of the deployed network over the validation images, 0..1 (one and
    the same with method "fp32"). history: every epoch of every stage.
    """

    out: Path
    checkpoint: Path
    accuracy_fp32: float
    accuracy: float
    history: tuple[EpochEvent, ...]


def train(
    config: TrainConfig,
    dataset: ImageDataset,
    out: Path,
    *,
    resume: bool = False,
    report: Callable[[Event], None] | None = None,
    accept: Callable[[QuantizedModel], None] | None = None,
) -> TrainResult:
    """Run every stage that the config asks for; leaves checkpoints and at last checkpoint-final.safetensors in `out`.

    resume: go on from the furthest readable checkpoint in `out`, from the beginning where there is none yet; a finished
    run is returned as it is. report: gets each event, between steps; it may raise KeyboardInterrupt to stop the run.
    accept: gets the network as it is going to be quantised, before anything is trained, and may refuse it by raising.
    Raises TrainingInterrupted after Ctrl-C, and TrainingError for: a device that is absent, an `out` that cannot be
    written or (without resume) holds a run, a resume under another config or other data, weights that do not fit,
    a loss that is not finite, too few images.
    """
    device = choose_device(config.device)
    if len(dataset.train) < 2 or len(dataset.validation) < 1:
        raise TrainingError(
            f"{config.data.name} has {len(dataset.train)} training and {len(dataset.validation)} validation images; "
            "training needs at least 2 and 1."
        )
    folder = CheckpointFolder(out, keep=config.schedule.keep_checkpoints)
    if not resume:
        folder.require_new()
    elif (out / FINAL).exists():
        return finished_run(out)
    tell = report or (lambda event: None)
    with reproducible(device), Interrupts() as interrupts:
        session = Session(State(config, dataset, device, accept), folder, tell, interrupts)
        position, checkpoint, complaints = folder.load_newest() if resume else (None, None, [])
        if checkpoint is not None and position is not None:
            complaints += session.restore(checkpoint, position)
        elif config.weights:
            complaints += session.state.load_weights()
        if resume and checkpoint is None:
            complaints.append(f"{out} holds no checkpoint yet; training starts from the beginning.")
        folder.make_writable()
        session.run(complaints)
    return finished_run(out)


def finished_run(out: Path) -> TrainResult:
    """What the finished run in `out` came to. Raises TrainingError if its final checkpoint cannot be read."""
    header = read_header(out / FINAL)
    return TrainResult(
        out=out,
        checkpoint=out / FINAL,
        accuracy_fp32=header["accuracy_fp32"],
        accuracy=header["accuracy"],
        history=tuple(EpochEvent(**record) for record in header["history"]),
    )
