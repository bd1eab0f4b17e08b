"""What a training run can be told: one frozen section per stage, validated where it is made.

Imports no torch, so that the command line can read and refuse a config before it pays for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mecdeploy.training.errors import TrainingError

BIT_WIDTHS = (2, 3, 4, 8)
METHODS = ("mec", "lsq", "fp32")
DEVICES = ("auto", "cpu", "cuda")
CODED_TENSORS = ("features", "activations", "weights")
VIEWS = ("one", "augmented", "teacher")
FORMS = ("mixture", "exact")
STEMS = ("auto", "small", "standard")


def _require_choice(key: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        listed = ", ".join(str(choice) for choice in choices)
        raise TrainingError(f"{key} is {value!r}; choose one of {listed}.")


def _require_at_least(key: str, value: float, minimum: float) -> None:
    if not value >= minimum:
        raise TrainingError(f"{key} is {value}; it must be at least {minimum}.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images.

    name: digits, cifar10, cifar100, fashion-mnist, or imagefolder:PATH (PATH/train/<class>/*, PATH/val|test/<class>/*).
    root: where torchvision keeps (and downloads) its data sets.
    image_size: side in pixels; 0 means the images' own size when all agree, else 224, unless
    none is larger than 64 pixels: then it has to be given.
    validation_fraction: carved from the training images when a folder has no val or test part.
    augment: random crops while training. flip: and mirrored images, where classes survive it (never digits, nor
    grayscale folders, which tend to hold characters).
    """

    name: str = "digits"
    root: str = "data"
    download: bool = True
    image_size: int = 0
    validation_fraction: float = 0.1
    skip_bad_images: bool = False
    workers: int = 2
    augment: bool = True
    flip: bool = True

    def __post_init__(self) -> None:
        _require_at_least("data.image_size", self.image_size, 0)
        if not 0.0 < self.validation_fraction < 1.0:
            raise TrainingError(f"data.validation_fraction is {self.validation_fraction}; it must lie between 0 and 1.")
        _require_at_least("data.workers", self.workers, 0)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network.

    stem: small (3x3 convolution, stride 1, no max pooling), standard (as published), or auto: small up to 64 pixels.
    """

    name: str = "resnet8"
    stem: str = "auto"

    def __post_init__(self) -> None:
        _require_choice("model.stem", self.stem, STEMS)


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Bit widths of every unit.

    first_last_bits: weights of the first and last layer, and the input of the last.
    skip_bits: the residual stream: both inputs of an Add and the sum that the next Add reads.
    overrides: unit name pattern (fnmatch) -> {"weight_bits": b, "act_bits": b}; the last match wins.
    """

    weight_bits: int = 4
    act_bits: int = 4
    first_last_bits: int = 8
    skip_bits: int = 8
    overrides: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("weight_bits", "act_bits", "first_last_bits", "skip_bits"):
            _require_choice(f"quant.{key}", getattr(self, key), BIT_WIDTHS)
        for pattern, widths in self.overrides.items():
            for key, bits in widths.items():
                if key not in ("weight_bits", "act_bits"):
                    raise TrainingError(
                        f"quant.overrides.{pattern!r} has the key {key!r}; use weight_bits or act_bits."
                    )
                _require_choice(f"quant.overrides.{pattern!r}.{key}", bits, BIT_WIDTHS)
        # A copy, and plain dicts: a read-only view could be neither pickled nor deep-copied, as a model is with it.
        own = {pattern: dict(widths) for pattern, widths in self.overrides.items()}
        object.__setattr__(self, "overrides", own)


@dataclass(frozen=True, kw_only=True)
class MecConfig:
    """The maximum-entropy-coding objective (docs/mec-quant.md).

    code: which tensors are coded. beta: weight of the objective in the loss. distortion: eps^2, for rows of unit RMS.
    experts, order: size of the mixture and terms of its Taylor series. samples: rows coded per tensor.
    views: one, augmented (a second augmentation) or teacher (the full-precision network's features).
    warmup: fraction of the QAT steps over which beta rises linearly from 0.
    """

    code: tuple[str, ...] = ("features",)
    beta: float = 0.1
    distortion: float = 0.5
    form: str = "mixture"
    experts: int = 8
    order: int = 4
    samples: int = 256
    center: bool = True
    views: str = "one"
    warmup: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", tuple(self.code))
        for name in self.code:
            _require_choice("mec.code", name, CODED_TENSORS)
        _require_choice("mec.form", self.form, FORMS)
        _require_choice("mec.views", self.views, VIEWS)
        for key, minimum in (("beta", 0.0), ("experts", 1), ("order", 1), ("samples", 2), ("warmup", 0.0)):
            _require_at_least(f"mec.{key}", getattr(self, key), minimum)
        if not self.distortion > 0:
            raise TrainingError(f"mec.distortion is {self.distortion}; it must be positive.")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long and how fast.

    fp_epochs: full-precision epochs before QAT. epochs: QAT epochs, of which the last frozen_epochs run with BatchNorm
    frozen and the deployed arithmetic simulated. calibration_images: training images that set the first step sizes.
    """

    fp_epochs: int = 30
    epochs: int = 20
    frozen_epochs: int = 3
    batch_size: int = 128
    fp_learning_rate: float = 0.1
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    calibration_images: int = 512

    def __post_init__(self) -> None:
        minimums = {"fp_epochs": 0, "epochs": 0, "frozen_epochs": 0, "batch_size": 2, "calibration_images": 1}
        for key, minimum in minimums.items():
            _require_at_least(f"schedule.{key}", getattr(self, key), minimum)
        for key in ("fp_learning_rate", "learning_rate"):
            if not getattr(self, key) > 0:
                raise TrainingError(f"schedule.{key} is {getattr(self, key)}; it must be positive.")
        if self.frozen_epochs > self.epochs:
            raise TrainingError(
                f"schedule.frozen_epochs is {self.frozen_epochs}, more than schedule.epochs ({self.epochs}); lower it."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run, whole.

    method: mec (LSQ plus the coding objective), lsq, or fp32 (the full-precision stage alone).
    init: a checkpoint or state dict to start from instead of random weights; empty for none.
    """

    method: str = "mec"
    seed: int = 0
    device: str = "auto"
    init: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    mec: MecConfig = field(default_factory=MecConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        _require_choice("method", self.method, METHODS)
        _require_choice("device", self.device, DEVICES)
        _require_at_least("seed", self.seed, 0)

    def describe(self) -> dict[str, Any]:
        """The config as plain nested dicts and lists, ready for TOML or JSON."""
        described: dict[str, Any] = _plain(self)
        return described


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {key: _plain(getattr(value, key)) for key in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
