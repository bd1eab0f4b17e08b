"""train: full precision, calibration, quantisation-aware training, the frozen final phase.

A run can stop after any step and go on, on a CPU bit for bit, because nothing random has a state: every seed is derived
from (seed, stage, epoch, step), and the learning rate is a function of the position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mecdeploy.training.checkpoint import FINAL, Checkpoint, Position, read_header
from mecdeploy.training.config import TrainConfig
from mecdeploy.training.data import ImageDataset
from mecdeploy.training.device import choose_device, reproducible
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import ACCURACY, EpochEvent, Event
from mecdeploy.training.interrupt import Interrupts
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.retention import CheckpointFolder
from mecdeploy.training.session import Session
from mecdeploy.training.state import State
from mecdeploy.training.world import ALONE, World


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run.

    accuracy_fp32, accuracy: of the full-precision and of the deployed network over the validation images, 0..1 (one and
    the same with method "fp32"). measure: what they are, AGREEMENT where these images have no labels. history: every
    epoch of every stage.
    """

    out: Path
    checkpoint: Path
    accuracy_fp32: float
    accuracy: float
    history: tuple[EpochEvent, ...]
    measure: str = ACCURACY


def train(
    config: TrainConfig,
    dataset: ImageDataset,
    out: Path,
    *,
    resume: bool = False,
    report: Callable[[Event], None] | None = None,
    accept: Callable[[QuantizedModel], None] | None = None,
    world: World = ALONE,
) -> TrainResult:
    """Run every stage that the config asks for; leaves checkpoints and at last checkpoint-final.safetensors in `out`.

    resume: go on from the furthest readable checkpoint in `out`, from the beginning where there is none yet; a finished
    run is returned as it is. report: gets each event, between steps; it may raise KeyboardInterrupt to stop the run.
    accept: gets the network as it is going to be quantised, before anything is trained, and may refuse it by raising.
    world: the processes that train together, each of which calls this alike; only process 0 reports and touches `out`.
    Raises TrainingInterrupted after Ctrl-C, and TrainingError for: a device that is absent, an `out` that cannot be
    written or (without resume) holds a run, a resume under another config or other data, weights that do not fit,
    a loss that is not finite, too few images, a batch that the processes cannot share; PeerFailed where another
    process raises one of these.
    """
    device = world.everywhere(lambda: choose_device(config.device, world.launch))
    _require_enough(config, dataset, world)
    folder = CheckpointFolder(out, keep=config.schedule.keep_checkpoints)
    if world.from_main(lambda: _is_finished(folder, resume)):
        return world.from_main(lambda: finished_run(out))
    tell = report or (lambda event: None)
    with reproducible(device), Interrupts() as interrupts:
        state = world.everywhere(lambda: State(config, dataset, device, accept, world))
        session = Session(state, folder, tell, interrupts)
        position, checkpoint, complaints = _newest(folder, world) if resume else (None, None, [])
        if checkpoint is not None and position is not None:
            complaints += world.everywhere(partial(session.restore, checkpoint, position))
        elif config.weights:
            complaints += world.local_first(state.load_weights)
        if resume and checkpoint is None:
            complaints.append(f"{out} holds no checkpoint yet; training starts from the beginning.")
        world.from_main(folder.make_writable)
        session.run(complaints)
    return world.from_main(lambda: finished_run(out))


def _require_enough(config: TrainConfig, dataset: ImageDataset, world: World) -> None:
    schedule, images = config.schedule, len(dataset.train)
    if images < 2 or len(dataset.validation) < 1:
        raise TrainingError(
            f"{config.data.name} has {images} training and {len(dataset.validation)} validation images; "
            "training needs at least 2 and 1."
        )
    shares = world.size * schedule.accumulation
    if schedule.batch_size % shares:
        raise TrainingError(
            f"schedule.batch_size is {schedule.batch_size}, for all processes together; {world.size} processes with "
            f"schedule.accumulation {schedule.accumulation} need a multiple of {shares}."
        )
    if shares > 1 and images < schedule.batch_size:
        raise TrainingError(
            f"{config.data.name} has {images} training images, less than one batch of schedule.batch_size "
            f"({schedule.batch_size}), which {shares} equal shares need; lower it."
        )


def _is_finished(folder: CheckpointFolder, resume: bool) -> bool:
    """Whether there is nothing left to do. Raises TrainingError for a run in the place of a new one."""
    if not resume:
        folder.require_new()
    return resume and (folder.folder / FINAL).exists()


def _newest(folder: CheckpointFolder, world: World) -> tuple[Position | None, Checkpoint | None, list[str]]:
    """As CheckpointFolder.load_newest, read by process 0 alone."""
    mine: list[Checkpoint] = []

    def read() -> tuple[Position | None, dict[str, Any] | None, list[str]]:
        position, checkpoint, complaints = folder.load_newest()
        mine.extend([] if checkpoint is None else [checkpoint])
        return position, None if checkpoint is None else checkpoint.header, complaints

    position, header, complaints = world.from_main(read)
    if header is None:
        return position, None, complaints
    tensors = world.tensors_from_main(mine[0].tensors if mine else {})
    return position, Checkpoint(tensors, header), complaints


def finished_run(out: Path) -> TrainResult:
    """What the finished run in `out` came to. Raises TrainingError if its final checkpoint cannot be read."""
    header = read_header(out / FINAL)
    return TrainResult(
        out=out,
        checkpoint=out / FINAL,
        accuracy_fp32=header["accuracy_fp32"],
        accuracy=header["accuracy"],
        history=tuple(EpochEvent(**record) for record in header["history"]),
        measure=header.get("measure", ACCURACY),
    )
