"""Everything of a run that changes as it trains, and how it goes into a checkpoint and comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mecdeploy.training.averaging import WeightAverage, estimate_statistics
from mecdeploy.training.calibration import calibrate
from mecdeploy.training.checkpoint import Checkpoint, Position
from mecdeploy.training.coded_layers import coded_layers
from mecdeploy.training.config import TrainConfig
from mecdeploy.training.data import ImageDataset
from mecdeploy.training.device import place
from mecdeploy.training.distillation import Teacher, last_linear
from mecdeploy.training.drawn_batches import calibration_batches, statistics_batches
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import ACCURACY, AGREEMENT
from mecdeploy.training.initial import fill, load_tensors, read_weights
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.models import build_model
from mecdeploy.training.names import are_published
from mecdeploy.training.optimizers import GuardedSGD, build_optimizer, momentum_tensors, restore_momentum
from mecdeploy.training.oscillation import WeightFreezer, low_bit_layers
from mecdeploy.training.preparation import prepare
from mecdeploy.training.progressive import FallingWidths
from mecdeploy.training.published import published_weights
from mecdeploy.training.resuming import differences, require_same_run
from mecdeploy.training.seeding import derive_seed
from mecdeploy.training.stages import FloatTask, QuantizedTask, Task
from mecdeploy.training.tally import Tally
from mecdeploy.training.world import ALONE, World


class State:
    """A run's networks, optimiser and position.

    float_model: the full-precision network, unchanged after stage fp32. model: the quantised one, once there is one.
    phase: of schedule.progressive, that its widths are those of.
    average: of the quantised one's parameters, in stage qat where schedule.averaging asks for it. freezer: of its
    weights, where quant.freezing asks for it.
    teacher: the full-precision network as the loss of the quantised one needs it, if it does.
    world: the processes that have the same state.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: ImageDataset,
        device: torch.device,
        accept: Callable[[QuantizedModel], None] | None = None,
        world: World = ALONE,
    ) -> None:
        self.config, self.dataset, self.device, self.world = config, dataset, device, world
        self.spec = _normalization(config, dataset)
        torch.manual_seed(derive_seed(config.seed, "weights"))
        self.float_model = place(
            build_model(
                config.network,
                num_classes=len(dataset.class_names),
                channels=dataset.channels,
                height=dataset.height,
                width=dataset.width,
            ),
            device,
        )
        self.model: QuantizedModel | None = None
        self.phase = 0
        self.average: WeightAverage | None = None
        self.freezer: WeightFreezer | None = None
        self.teacher: Teacher | None = None
        self.position = Position.of("fp32", 0, 0)
        self.tally = Tally()
        self.history: list[dict[str, Any]] = []
        self.accuracy_fp32: float | None = None
        self._begin_float()
        if config.method != "fp32":
            model = self._prepared()  # what cannot be quantised is refused before it is trained, not after
            if config.method == "mec":
                coded_layers(model, config.mec)
            if config.method == "mec" and config.mec.views == "teacher":
                last_linear(self.float_model)
            low_bit_layers(model)
            if accept is not None:
                accept(model.cpu())

    @property
    def train_measure(self) -> str:
        """What the share of right answers on training images is: without labels the teacher's answers are right."""
        return ACCURACY if self.config.data.labels == "given" else AGREEMENT

    @property
    def validation_measure(self) -> str:
        """The same on validation images."""
        return ACCURACY if self.dataset.validation_labelled else AGREEMENT

    def load_weights(self) -> list[str]:
        """Start from config.weights instead of random ones, with their normalisation unless the config has one.

        Returns sentences about what of them was not taken as it is. Raises TrainingError.
        """
        config = self.config
        weights = (
            published_weights(config.model.name, config.weights)
            if are_published(config.weights)
            else read_weights(Path(config.weights))
        )
        notes = fill(self.float_model, weights, whole=config.data.labels == "none")
        if weights.input is not None and not config.model.mean:
            self.spec = weights.input.for_images(
                channels=self.spec.channels, height=self.spec.height, width=self.spec.width
            )
            self._begin_float()
        return notes

    def quantize(self) -> None:
        """Replace the task by that of a freshly calibrated quantised network, at the start of stage qat."""
        model = self._prepared()
        self._widths(model).apply(0)
        torch.manual_seed(derive_seed(self.config.seed, "calibrate"))  # dropout draws here, too
        calibrate(model, calibration_batches(self.config, self.dataset, self.device))
        self._begin_quantized(model)
        self.position = Position.of("qat", 0, 0)
        self._begin_average(model)

    def enter_phase(self, phase: int) -> None:
        """Go on with the widths of another phase of schedule.progressive; an average begins anew."""
        assert self.model is not None
        torch.manual_seed(derive_seed(self.config.seed, "calibrate", phase))
        for parameter in self.widths.enter(phase, calibration_batches(self.config, self.dataset, self.device)):
            self.optimizer.state.pop(parameter, None)
        self.phase = phase
        self._begin_average(self.model)

    def freeze(self) -> None:
        """Enter stage deploy, with the average of the parameters where there is one.

        The momentum is forgotten then: it was gathered elsewhere.
        """
        assert self.model is not None
        if self.average is not None:
            self.average.put_in()
            self.average = None
            estimate_statistics(self.model, statistics_batches(self.config, self.dataset, self.device))
            self.optimizer = self._quantized_optimizer(self.model)
        self.model.freeze()
        self.position = Position.of("deploy", 0, 0)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint of this position holds as tensors."""
        named = {f"float.{name}": tensor for name, tensor in self.float_model.state_dict().items()}
        if self.model is not None:
            named |= {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.average is not None:
            named |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        if self.freezer is not None:
            named |= {f"freezer.{name}": tensor for name, tensor in self.freezer.tensors().items()}
        momentum = momentum_tensors(self.optimizer, self.task.network)
        return named | {f"momentum.{name}": tensor for name, tensor in momentum.items()}

    def header(self) -> dict[str, Any]:
        """Everything else of it, JSON-able."""
        return {
            "config": self.config.describe(),
            "stage": self.position.stage,
            "epoch": self.position.epoch,
            "step": self.position.step,
            "phase": self.phase,
            "tally": dataclasses.asdict(self.tally),
            "history": self.history,
            "accuracy_fp32": self.accuracy_fp32,
            "measure": self.validation_measure,
            "class_names": list(self.dataset.class_names),
            "train_images": len(self.dataset.train),
            "input": dataclasses.asdict(self.spec),
            "torch": torch.__version__,
            "device": self.device.type,
            "processes": self.world.size,
        }

    def restore(self, checkpoint: Checkpoint, path: Path) -> list[str]:
        """Become what was saved; returns sentences about what may differ from an uninterrupted run.

        Raises TrainingError when config or data are not those of the checkpoint.
        """
        header = checkpoint.header
        require_same_run(self.config, self.dataset, self.spec, header, path)
        load_tensors(self.float_model, checkpoint.section("float"))
        self.spec = InputSpec(**header["input"])  # of weights that may be gone by now
        self._begin_float()
        self.position = Position.of(header["stage"], header["epoch"], header["step"])
        if self.position.stage != "fp32":
            model = self._prepared()
            self.phase = header.get("phase", 0)
            self._widths(model).apply(self.phase)
            if self.position.stage == "deploy":
                model.freeze()
            model.load_state_dict(checkpoint.section("model"))
            self._begin_quantized(model)
            self._begin_average(model)
            if self.average is not None:
                self.average.restore(checkpoint.section("average"))
            if self.freezer is not None:
                self.freezer.restore(checkpoint.section("freezer"))
        restore_momentum(self.optimizer, self.task.network, checkpoint.section("momentum"))
        self.tally = Tally(**header["tally"])
        self.history, self.accuracy_fp32 = header["history"], header["accuracy_fp32"]
        return differences(header, self.device, self.world, path.name)

    def _begin_float(self) -> None:
        schedule = self.config.schedule
        self.task: Task = FloatTask(
            self.float_model, self.spec, label_smoothing=schedule.label_smoothing, device=self.device
        )
        self.optimizer = build_optimizer(self.float_model, schedule)

    def _begin_quantized(self, model: QuantizedModel) -> None:
        config = self.config
        mec = config.mec if config.method == "mec" else None
        labelled, coded = config.data.labels == "given", mec is not None and mec.views == "teacher"
        if coded or config.distill.weight > 0 or not labelled:
            self.teacher = Teacher(self.float_model, self.spec, device=self.device, features=coded)
        self.model = model
        if self.config.quant.freezing:
            self.freezer = WeightFreezer(low_bit_layers(model), self.config.quant.freezing)
        self.task = QuantizedTask(
            model,
            label_smoothing=self.config.schedule.label_smoothing,
            device=self.device,
            mec=mec,
            distill=config.distill,
            teacher=self.teacher,
            labelled=labelled,
            world=self.world,
        )
        self.optimizer = self._quantized_optimizer(model)

    def _quantized_optimizer(self, model: QuantizedModel) -> GuardedSGD:
        return build_optimizer(model, self.config.schedule, model.step_sizes(), model.clipping_steps())

    def _widths(self, model: QuantizedModel) -> FallingWidths:
        self.widths = FallingWidths(model, self.config.schedule.progressive)
        return self.widths

    def _begin_average(self, model: QuantizedModel) -> None:
        decay = self.config.schedule.averaging
        if decay > 0 and self.position.stage == "qat":
            self.average = WeightAverage(model, decay)

    def _prepared(self) -> QuantizedModel:
        model = place(prepare(self.float_model, self.config.quant, self.spec, self.config.method), self.device)
        assert isinstance(model, QuantizedModel)
        return model


def _normalization(config: TrainConfig, dataset: ImageDataset) -> InputSpec:
    """What the config says, else the data set's own statistics. Raises TrainingError for other numbers of channels."""
    mean, std = config.model.mean, config.model.std
    if not mean:
        return InputSpec.from_statistics(
            channels=dataset.channels,
            height=dataset.height,
            width=dataset.width,
            mean=dataset.pixel_mean,
            std=dataset.pixel_std,
        )
    if len(mean) != dataset.channels:
        raise TrainingError(
            f"model.mean and model.std have {len(mean)} values, the images {dataset.channels} channels; "
            "give one for each."
        )
    return InputSpec.from_channels(
        height=dataset.height, width=dataset.width, mean=[255 * m for m in mean], std=[255 * s for s in std]
    )
