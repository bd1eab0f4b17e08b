"""One session of a run: from wherever the state stands to the final checkpoint, or to an interruption."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn

from mecdeploy.training.checkpoint import FINAL, Checkpoint, Position, write_checkpoint
from mecdeploy.training.data import Batch, step_count
from mecdeploy.training.diagnose import constant_outputs
from mecdeploy.training.errors import PeerFailed, TrainingError
from mecdeploy.training.evaluate import evaluate
from mecdeploy.training.events import (
    ACCURACY,
    Event,
    StepEvent,
    TrainingInterrupted,
    WarningEvent,
)
from mecdeploy.training.interrupt import Interrupts
from mecdeploy.training.last_good import another_run, newest_good
from mecdeploy.training.optimizers import learning_rate, set_learning_rate, warmup_steps
from mecdeploy.training.progressive import first_epoch, phase_at
from mecdeploy.training.retention import CheckpointFolder
from mecdeploy.training.seeding import derive_seed
from mecdeploy.training.stages import Stage, plan_stages
from mecdeploy.training.standing import checkpoint_header, epoch_event, stage_event
from mecdeploy.training.state import State
from mecdeploy.training.stepping import Gradients, Measured
from mecdeploy.training.tally import Tally
from mecdeploy.training.watch import LossWatch, SizeWatch, watched_loss


class Session:
    """Trains a State stage by stage, saving and reporting as it goes.

    With several processes each has a session over its own copy of the state, and all of them do the same at the same
    time: what they decide by is agreed on. Process 0 alone reports, and touches the folder.
    """

    def __init__(
        self, state: State, folder: CheckpointFolder, report: Callable[[Event], None], interrupts: Interrupts
    ) -> None:
        self.state, self.folder, self.report, self.interrupts = state, folder, report, interrupts
        self.world = state.world
        train, batch_size = state.dataset.train, state.config.schedule.batch_size
        self.stages = plan_stages(state.config, step_count(len(train), batch_size, drop_last=True))
        self._saved: Position | None = None
        self._saved_at = time.monotonic()
        self._consistent = True  # whether the state is exactly that of its position, so that it may be saved
        self._together = self.world.alone  # whether all processes are at this place, so that they may save
        self._watch()

    def restore(self, checkpoint: Checkpoint, position: Position) -> list[str]:
        """Go on from a checkpoint; sentences as in State.restore."""
        complaints = self.state.restore(checkpoint, self.folder.path(position))
        self._saved = position
        return complaints

    def run(self, complaints: Iterable[str] = ()) -> Path:
        """Report the complaints as warnings, train what is left, write the final checkpoint and return its path.

        Raises TrainingInterrupted, after saving, on Ctrl-C or when `report` raises KeyboardInterrupt.
        """
        try:
            for complaint in complaints:
                self._emit(WarningEvent(message=complaint))
            for stage in self.stages:
                if self.state.position <= Position.of(stage.name, stage.epochs, 0):
                    self._run_stage(stage)
            return self._conclude()
        except KeyboardInterrupt:
            raise self._interrupted() from None

    def _run_stage(self, stage: Stage) -> None:
        state = self.state
        if stage.name != "fp32" and state.model is None:
            self._announce("calibrate", 0, 0)
            self._consistent = False
            state.quantize()
            self._consistent = True
        if stage.name == "deploy" and state.position.stage != "deploy":
            self._consistent = False
            state.freeze()
            self._consistent = True
        if state.position.epoch < stage.epochs:
            self._watch()
            self._announce(stage.name, stage.epochs, stage.steps)
            gradients = Gradients(state)
        while state.position.epoch < stage.epochs:
            if self._enter_phase(stage):
                self._watch()
                gradients = Gradients(state)
            self._run_epoch(stage, gradients)
        if state.accuracy_fp32 is None:  # weights from elsewhere, not trained here
            state.accuracy_fp32 = self._validate()
            self._save()

    def _watch(self) -> None:
        """Look out for divergence from here on: of another network, or one that was calibrated anew."""
        state = self.state
        self._losses = LossWatch(len(state.dataset.class_names), state.train_measure == ACCURACY)
        self._sizes = SizeWatch(state.task.network)

    def _enter_phase(self, stage: Stage) -> bool:
        """Change the widths where schedule.progressive has others from this epoch on; returns whether it has."""
        state = self.state
        widths = state.config.schedule.progressive
        phase = phase_at(state.position.epoch, stage.epochs, widths) if stage.name == "qat" else state.phase
        if phase == state.phase:
            return False
        self._announce("calibrate", 0, 0)
        self._consistent = False
        state.enter_phase(phase)
        self._consistent = True
        self._announce(stage.name, stage.epochs, stage.steps)
        return True

    def _run_epoch(self, stage: Stage, gradients: Gradients) -> None:
        state, config = self.state, self.state.config
        batches = state.dataset.train.batches(
            config.schedule.batch_size,
            device=state.device,
            seed=derive_seed(config.seed, stage.name),
            epoch=state.position.epoch,
            start_step=state.position.step,
            augment=config.data.augment,
            views=state.task.views,
            drop_last=True,
            share=self.world.share,
        )
        state.task.network.train()
        images, seconds, clock = 0, 0.0, time.perf_counter()
        for batch in batches:
            event, measured = self._step(stage, batch, gradients)
            now = time.perf_counter()
            state.tally.seconds += now - clock
            images, seconds, clock = images + measured.images, seconds + now - clock, now
            # What the caller answers to a step is agreed on in the next one, with its loss.
            self._emit(
                dataclasses.replace(event, images_per_second=images / max(seconds, 1e-9)), check=self.world.alone
            )
            if measured.stop:
                self._stop()
            if measured.save and event.step < event.steps:
                self._require_training(stage)
                self._save()
                clock = time.perf_counter()
        self._require_training(stage)
        self._end_epoch(stage)

    def _step(self, stage: Stage, batch: Batch, gradients: Gradients) -> tuple[StepEvent, Measured]:
        state = self.state
        epoch, step = state.position.epoch, state.position.step
        done = stage.first_step + epoch * stage.steps + step
        seed = derive_seed(state.config.seed, stage.name, "step", epoch, step)
        fraction = done / stage.schedule_steps
        self._consistent = False
        self._forward = partial(gradients.forward, batch, fraction=fraction, seed=seed)
        measured = gradients.compute(
            batch,
            fraction=fraction,
            seed=seed,
            stop=self.interrupts.requested,
            save=time.monotonic() - self._saved_at > 60.0 * state.config.schedule.save_minutes,
        )
        if not measured.finite:
            parts = ", ".join(f"{name} {value:.6g}" for name, value in measured.terms.items())
            culprit = gradients.culprit(self._forward)
            raise self._failed(stage, step + 1, f"the loss is {measured.loss}", f" ({parts}): {culprit}")
        rate = learning_rate(stage.base_rate, done, stage.schedule_steps)
        set_learning_rate(state.optimizer, rate)
        state.optimizer.step()
        if state.freezer is not None and stage.name != "fp32":
            state.freezer.update()
        if state.average is not None:
            began = first_epoch(state.phase, stage.epochs, state.config.schedule.progressive)
            state.average.update((epoch - began) * stage.steps + step)
        watched = watched_loss(measured.terms, state.config.distill.temperature)
        self._losses.add(watched, warming_up=done < warmup_steps(stage.schedule_steps))
        self._sizes.look(epoch + 1, step + 1)
        state.tally.add(measured.images, measured.loss, measured.correct, measured.terms)
        state.position = Position.of(stage.name, epoch, step + 1)
        self._consistent = True
        event = StepEvent(
            stage=stage.name,
            epoch=epoch + 1,
            epochs=stage.epochs,
            step=step + 1,
            steps=stage.steps,
            loss=measured.loss,
            learning_rate=rate,
            images_per_second=0.0,
            terms=measured.terms,
        )
        return event, measured

    def _end_epoch(self, stage: Stage) -> None:
        state, accuracy = self.state, self._validate()
        epoch = state.position.epoch + 1
        event = epoch_event(state, stage, accuracy)
        self._consistent = False
        state.history.append(asdict(event))
        state.position, state.tally = Position.of(stage.name, epoch, 0), Tally()
        if stage.name == "fp32" and epoch == stage.epochs:
            state.accuracy_fp32 = accuracy
        self._consistent = True
        self._emit(event)
        self._save()

    def _validate(self) -> float:
        state = self.state
        self.world.same_buffers(state.task.network)  # BatchNorm statistics, where they are local
        validation, answers = state.dataset.validation, None
        if not state.dataset.validation_labelled:
            if state.teacher is None:
                return 1.0  # before there is a quantised network, the teacher is asked about itself
            answers = state.teacher.answers
        return evaluate(state.task, validation, state.device, self._check, answers=answers, world=self.world)

    def _emit(self, event: Event, *, check: bool = True) -> None:
        if self.world.main:
            try:
                self.report(event)
            except KeyboardInterrupt:
                self.interrupts.requested = True
        if check:
            self._check()

    def _check(self) -> None:
        """Stop if any process has been asked to; all take part."""
        if self.world.any(self.interrupts.requested):
            self._stop()

    def _stop(self) -> NoReturn:
        self._together = True
        raise KeyboardInterrupt

    def _announce(self, name: str, epochs: int, steps: int) -> None:
        self._emit(stage_event(self.state, self.stages, name, epochs, steps))

    def _save(self) -> None:
        """Save, or say why not and go on: the older checkpoints are still there. All take part."""
        position = self.state.position
        self.world.same_buffers(self.state.task.network)
        try:
            if self.world.main:
                self.folder.save(position, self.state.tensors(), checkpoint_header(self.state, self.stages))
            self._saved = position
        except OSError as error:
            message = (
                f"{position.file_name} could not be written ({error.strerror or error}); training goes on without it."
            )
            self._emit(WarningEvent(message=message), check=False)
        except TrainingError as error:
            raise TrainingError(f"{error} {self._last_good()}") from error
        self._saved_at = time.monotonic()

    def _conclude(self) -> Path:
        state, path = self.state, self.folder.folder / FINAL
        last = state.history[-1] if state.history else None
        accuracy = state.accuracy_fp32
        if state.model is not None:
            trained = last is not None and last["stage"] != "fp32"
            # An average that entered after the last epoch has not been measured.
            trained = trained and not (
                state.config.schedule.averaging and state.position == Position.of("deploy", 0, 0)
            )
            accuracy = last["validation_accuracy"] if last is not None and trained else self._validate()
        tensors = {
            name: tensor for name, tensor in state.tensors().items() if not name.startswith(("momentum.", "freezer."))
        }
        try:
            if self.world.main:
                write_checkpoint(
                    path,
                    tensors,
                    {**checkpoint_header(self.state, self.stages), "accuracy": accuracy, "finished": True},
                )
        except OSError as error:
            raise TrainingError(
                f"{path} could not be written ({error.strerror or error}); make room and resume. {self._last_good()}"
            ) from error
        return path

    def _interrupted(self) -> TrainingInterrupted:
        if self._together and self.world.any(self._consistent and self._saved != self.state.position):
            self._save()
        saved = self._saved
        path = None if saved is None else self.folder.path(saved)
        where = saved or self.state.position
        return TrainingInterrupted(path, stage=where.stage, epoch=where.epoch, step=where.step)

    def _require_training(self, stage: Stage) -> None:
        """Raise TrainingError rather than save a network that is certain not to train."""
        complaint = self._losses.complaint()
        if complaint is not None:
            silent = constant_outputs(self.state.task.network, self._forward)
            dead = f"; every output of {', '.join(silent)} is one code" if silent else ""
            raise self._failed(stage, self.state.position.step, "training diverged", f": {complaint}{dead}")

    def _failed(self, stage: Stage, step: int, what: str, why: str) -> TrainingError | PeerFailed:
        """The error that all processes have come to, said by process 0."""
        if not self.world.main:
            return PeerFailed(0)
        epoch = self.state.position.epoch + 1
        first = self._sizes.first(epoch, step)
        why += "" if first is None else f"; {first}"
        good = newest_good(self.folder, self.state, self._losses.limit)
        return TrainingError(
            f"{what} in stage {stage.name}, epoch {epoch}, step {step}{why}. {self._last_good()} "
            f"Resumed, it would fail again: {another_run(stage, good)}"
        )

    def _last_good(self) -> str:
        good = newest_good(self.folder, self.state, self._losses.limit)
        if good is None:
            return "There is no checkpoint yet." if self._saved is None else "No checkpoint is from before that."
        return f"The last good checkpoint is {good.name}."
