"""Where a session stands, as it says so: the events of stages and epochs, and the header of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mecdeploy.training.checkpoint import Position
from mecdeploy.training.events import EpochEvent, StageEvent
from mecdeploy.training.optimizers import learning_rate
from mecdeploy.training.stages import Stage
from mecdeploy.training.state import State


def stage_event(state: State, stages: Sequence[Stage], name: str, epochs: int, steps: int) -> StageEvent:
    """The event of a stage, or of calibrate, that begins or goes on now. stages: all of the session."""
    trained = [stage.name for stage in stages if stage.epochs]
    if len(stages) > 1:
        trained.insert(trained.count("fp32"), "calibrate")
    resumed = state.position if state.position.stage == name else Position.of(name, 0, 0)
    widths, phase = state.config.schedule.progressive, state.phase
    passing = [*(f"{bits} bits" for bits in widths), "the final widths"] if widths and name == "qat" else [""]
    parameters = sum(p.numel() for p in state.task.network.parameters() if p.requires_grad)
    return StageEvent(
        stage=name,
        stages=tuple(trained),
        epochs=epochs,
        steps=steps,
        epoch=resumed.epoch,
        step=resumed.step,
        parameters=parameters,
        device=str(state.device),
        processes=state.world.size,
        widths=passing[phase] if len(passing) > 1 else "",
    )


def epoch_event(state: State, stage: Stage, accuracy: float) -> EpochEvent:
    """The event of an epoch whose last step is done. accuracy: on validation images, after it."""
    tally, epoch = state.tally, state.position.epoch + 1
    return EpochEvent(
        stage=stage.name,
        epoch=epoch,
        epochs=stage.epochs,
        loss=tally.mean(tally.loss),
        terms={name: tally.mean(value) for name, value in tally.terms.items()},
        train_accuracy=tally.mean(tally.correct),
        validation_accuracy=accuracy,
        learning_rate=learning_rate(stage.base_rate, stage.first_step + epoch * stage.steps - 1, stage.schedule_steps),
        seconds=tally.seconds,
        images_per_second=tally.images / max(tally.seconds, 1e-9),
        train_measure=state.train_measure,
        validation_measure=state.validation_measure,
    )


def checkpoint_header(state: State, stages: Sequence[Stage]) -> dict[str, Any]:
    """Of a checkpoint at the state's position, JSON-able, with its accuracy if that has just been measured."""
    position, history = state.position, state.history
    epochs = {stage.name: stage.epochs for stage in stages}
    last = history[-1] if history and not position.step else {}
    measured = (last.get("stage"), last.get("epoch")) == (position.stage, position.epoch)
    # An accuracy at wider quantisers is none of the network that is wanted, and makes no checkpoint the best.
    measured = measured and (position.stage != "qat" or state.phase == len(state.config.schedule.progressive))
    return {
        **state.header(),
        "stage_epochs": epochs,
        "stage_end": position == Position.of(position.stage, epochs[position.stage], 0),
        "accuracy": last["validation_accuracy"] if measured else None,
    }
