"""What a training run can be told: one frozen section per stage, validated where it is made.

Imports no torch, so that the command line can read and refuse a config before it pays for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.methods import RULES
from mecdeploy.training.names import are_published

BIT_WIDTHS = (2, 3, 4, 8)
LAYER_WIDTHS = (1, *BIT_WIDTHS)
WEIGHT_GRIDS = ("uniform", "midrise", "ternary", "levels", "codebook")
TWO_BIT_GRIDS = ("ternary", "codebook")
TABLE_GRIDS = ("levels", "codebook")
"""Those whose table is learned."""
ZERO_POINTS = ("fixed", "learned")
METHODS = (*RULES, "fp32")
DEVICES = ("auto", "cpu", "cuda")
CODED_TENSORS = ("features", "activations", "weights")
VIEWS = ("one", "augmented", "teacher")
FORMS = ("mixture", "exact")
STEMS = ("auto", "small", "standard")
BATCH_NORMS = ("synchronized", "local")
VALIDATIONS = ("given", "carved")
LABELS = ("given", "none")
RENAMED = {"init": "weights"}
"""Keys of older configs and checkpoints -> what they are now."""


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

    name: digits, cifar10, cifar100, fashion-mnist, imagefolder:PATH (PATH/train/<class>/*, PATH/val|test/<class>/*),
    or shards:PATH (PATH/train/*.tar, PATH/val|test/*.tar in the WebDataset format).
    root: where torchvision keeps (and downloads) its data sets.
    image_size: side in pixels; 0 means the images' own size when all agree, else 224, unless
    none is larger than 64 pixels: then it has to be given. For shards, 0 means 224.
    validation: given (a folder's val or test part, a data set's test part) or carved from the training images, so that
    the given part stays unseen (ImageDataset.test).
    validation_fraction: of the training images; carved from them, too, when a folder has no val or test part.
    labels: given, or none: nothing is trained on labels, a teacher takes their place (docs/unlabelled.md).
    fraction: how much of what is left to train on, class by class; validation and test do not depend on it.
    augment: random crops while training. flip: and mirrored images, where classes survive it (never digits, nor
    grayscale folders, which tend to hold characters).
    """

    name: str = "digits"
    root: str = "data"
    download: bool = True
    image_size: int = 0
    labels: str = "given"
    validation: str = "given"
    validation_fraction: float = 0.1
    fraction: float = 1.0
    skip_bad_images: bool = False
    workers: int = 2
    augment: bool = True
    flip: bool = True

    def __post_init__(self) -> None:
        _require_at_least("data.image_size", self.image_size, 0)
        _require_choice("data.labels", self.labels, LABELS)
        _require_choice("data.validation", self.validation, VALIDATIONS)
        if not 0.0 < self.validation_fraction < 1.0:
            raise TrainingError(f"data.validation_fraction is {self.validation_fraction}; it must lie between 0 and 1.")
        if not 0.0 < self.fraction <= 1.0:
            raise TrainingError(f"data.fraction is {self.fraction}; it must be more than 0 and at most 1.")
        _require_at_least("data.workers", self.workers, 0)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network.

    name: resnet8 to resnet56, a classifier of torchvision, or path/to/file.py:factory.
    stem: small (3x3 convolution, stride 1, no max pooling), standard (as published), or auto: small up to 64 pixels
    where the network has a small one, and standard with published weights.
    mean, std: what the network's input is normalised by, one for each channel, for pixels of 0..1; empty for those of
    the weights, or of the data set where there are none.
    """

    name: str = "resnet8"
    stem: str = "auto"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for key in ("mean", "std"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        _require_choice("model.stem", self.stem, STEMS)
        if len(self.mean) != len(self.std):
            raise TrainingError(
                f"model.mean has {len(self.mean)} values and model.std {len(self.std)}; give both one for each channel."
            )
        for mean in self.mean:
            if not 0.0 <= mean <= 1.0:
                raise TrainingError(f"model.mean holds {mean}; pixels are 0..1 here, so divide by 255.")
        for std in self.std:
            if not 0.0 < std <= 1.0:
                raise TrainingError(f"model.std holds {std}; pixels are 0..1 here, so it must be positive, at most 1.")


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Bit widths of every unit.

    weight_bits, act_bits: of the inner layers. At 1 bit weights are -1 and 1, and what a layer reads is 0 or 1; values
    of both signs keep 2 bits.
    weight_grid: what the weights of every layer below 8 bits can be (docs/weight-grids.md).
    first_last_bits: weights of the first and last layer, and the input of the last.
    skip_bits: whatever other kernels than layers read: the residual stream (both inputs of an Add and the sum that the
    next Add reads), what is pooled, multiplied or goes through a sigmoid.
    zero_point: of values of both signs: fixed in the middle of the range, or learned (LSQ+), which suits the skewed
    outputs of swish.
    float_layers: operator name patterns (fnmatch) that stay in float.
    damping: largest weight of the loss that draws weights to the middle of their bins; 0 for none. freezing: how often,
    on average, a weight's integer may turn back in a step before it is held; 0 for always. Both of layers below 8 bits.
    overrides: unit name pattern (fnmatch) -> {"weight_bits": b, "act_bits": b}; the last match wins.
    """

    weight_bits: int = 4
    act_bits: int = 4
    first_last_bits: int = 8
    skip_bits: int = 8
    zero_point: str = "fixed"
    weight_grid: str = "uniform"
    float_layers: tuple[str, ...] = ()
    damping: float = 0.0
    freezing: float = 0.0
    overrides: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("weight_bits", "act_bits"):
            _require_choice(f"quant.{key}", getattr(self, key), LAYER_WIDTHS)
        for key in ("first_last_bits", "skip_bits"):
            _require_choice(f"quant.{key}", getattr(self, key), BIT_WIDTHS)
        _require_choice("quant.weight_grid", self.weight_grid, WEIGHT_GRIDS)
        if self.weight_grid in TWO_BIT_GRIDS and self.weight_bits != 2:
            raise TrainingError(
                f"quant.weight_grid is {self.weight_grid}, which has 2 bits, and quant.weight_bits {self.weight_bits}; "
                "set quant.weight_bits = 2."
            )
        _require_choice("quant.zero_point", self.zero_point, ZERO_POINTS)
        object.__setattr__(self, "float_layers", tuple(self.float_layers))
        _require_at_least("quant.damping", self.damping, 0.0)
        if not 0.0 <= self.freezing < 1.0:
            raise TrainingError(
                f"quant.freezing is {self.freezing}; it is a frequency, at least 0 and below 1 (0.02 to 0.1 is usual)."
            )
        for pattern, widths in self.overrides.items():
            for key, bits in widths.items():
                if key not in ("weight_bits", "act_bits"):
                    raise TrainingError(
                        f"quant.overrides.{pattern!r} has the key {key!r}; use weight_bits or act_bits."
                    )
                _require_choice(f"quant.overrides.{pattern!r}.{key}", bits, LAYER_WIDTHS)
        # A copy, and plain dicts: a read-only view could be neither pickled nor deep-copied, as a model is with it.
        own = {pattern: dict(widths) for pattern, widths in self.overrides.items()}
        object.__setattr__(self, "overrides", own)

    @property
    def all_weight_bits(self) -> set[int]:
        """Every width that weights of inner layers may have."""
        return {self.weight_bits, *(each["weight_bits"] for each in self.overrides.values() if "weight_bits" in each)}


@dataclass(frozen=True, kw_only=True)
class MecConfig:
    """The maximum-entropy-coding objective (docs/mec-quant.md).

    code: which tensors are coded. beta: weight of the objective in the loss. distortion: eps^2, for rows of unit RMS.
    experts, order: size of the mixture and terms of its Taylor series. samples: rows coded per tensor.
    views: one, augmented (a second augmentation) or teacher (the full-precision network's features).
    warmup, decay: fractions of the QAT steps over which beta rises linearly from 0 at the start, and falls to 0 at the
    end. layers: unit name patterns (fnmatch) whose activations and weights are coded; empty for all.
    gather: with several processes, code the rows of all of them together, as one process would, or each its own.
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
    decay: float = 0.0
    layers: tuple[str, ...] = ()
    gather: bool = True

    def __post_init__(self) -> None:
        for key in ("code", "layers"):
            object.__setattr__(self, key, tuple(getattr(self, key)))
        for name in self.code:
            _require_choice("mec.code", name, CODED_TENSORS)
        _require_choice("mec.form", self.form, FORMS)
        _require_choice("mec.views", self.views, VIEWS)
        for key, minimum in (
            ("beta", 0.0),
            ("experts", 1),
            ("order", 1),
            ("samples", 2),
            ("warmup", 0.0),
            ("decay", 0.0),
        ):
            _require_at_least(f"mec.{key}", getattr(self, key), minimum)
        if self.decay > 0 and self.warmup + self.decay > 1:
            raise TrainingError(
                f"mec.warmup is {self.warmup} and mec.decay {self.decay}: beta would fall before it has risen; lower "
                "them to 1 together."
            )
        if self.layers and not {"activations", "weights"} & set(self.code):
            raise TrainingError(
                "mec.layers chooses among activations and weights, and mec.code asks for neither; add one to it, or "
                "leave mec.layers out."
            )
        if not self.distortion > 0:
            raise TrainingError(f"mec.distortion is {self.distortion}; it must be positive.")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation from the full-precision network of the run, while it is quantised.

    weight: share of the task loss, which becomes (1 - weight) cross entropy + weight T^2 KL(teacher || student); 0 is
    off. Without labels there is nothing to share with, and any weight above 0 stands for all of it.
    temperature: T, by which both networks' logits are divided. At 1 no gradient is larger than cross entropy's can be,
    so that its learning rate serves; T lets them be T times as large.
    """

    weight: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 1.0:
            raise TrainingError(f"distill.weight is {self.weight}; it must lie between 0 and 1.")
        if not self.temperature > 0:
            raise TrainingError(f"distill.temperature is {self.temperature}; it must be positive.")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long and how fast.

    fp_epochs: full-precision epochs before QAT. epochs: QAT epochs, of which the last frozen_epochs run with BatchNorm
    frozen and the deployed arithmetic simulated. calibration_images: training images that set the first step sizes.
    step_rate: learning rate of the quantisers' step sizes, in those of the weights; 0 leaves them as calibrated.
    averaging: decay, per step, of a moving average of all parameters over the live epochs, which then takes their place
    for the frozen ones; 0 for none.
    progressive: falling widths of weights and activations that the live epochs pass through, in equal shares, before
    the final ones; empty for none.
    batch_size: images of one optimiser step, on all processes together. accumulation: parts in which they are worked
    through one after the other, for networks whose batch does not fit the memory.
    compile: whether the live stages run through torch.compile: faster steps, after a first one of a minute or so.
    batch_norm: with several processes, over the images of all of them (synchronized), or of each its own (local).
    keep_checkpoints: how many of the newest stay, beside the best and the stage ends. save_minutes: an epoch that takes
    longer is saved on its way, too.
    """

    fp_epochs: int = 30
    epochs: int = 20
    frozen_epochs: int = 3
    batch_size: int = 128
    fp_learning_rate: float = 0.1
    learning_rate: float = 0.02
    step_rate: float = 1.0
    averaging: float = 0.0
    progressive: tuple[int, ...] = ()
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    calibration_images: int = 512
    accumulation: int = 1
    compile: bool = False
    batch_norm: str = "synchronized"
    keep_checkpoints: int = 2
    save_minutes: float = 10.0

    def __post_init__(self) -> None:
        minimums = {"fp_epochs": 0, "epochs": 0, "frozen_epochs": 0, "batch_size": 2}
        for key, minimum in {**minimums, "calibration_images": 1, "keep_checkpoints": 1, "accumulation": 1}.items():
            _require_at_least(f"schedule.{key}", getattr(self, key), minimum)
        _require_at_least("schedule.step_rate", self.step_rate, 0.0)
        _require_choice("schedule.batch_norm", self.batch_norm, BATCH_NORMS)
        if self.batch_size % self.accumulation:
            raise TrainingError(
                f"schedule.batch_size is {self.batch_size}, which schedule.accumulation ({self.accumulation}) does not "
                "divide into equal parts; choose a multiple of it."
            )
        for key in ("fp_learning_rate", "learning_rate", "save_minutes"):
            if not getattr(self, key) > 0:
                raise TrainingError(f"schedule.{key} is {getattr(self, key)}; it must be positive.")
        if not 0.0 <= self.averaging < 1.0:
            raise TrainingError(
                f"schedule.averaging is {self.averaging}; it is a decay per step, at least 0 and below 1."
            )
        if self.averaging and 0 < self.epochs == self.frozen_epochs:
            raise TrainingError(
                f"schedule.averaging is {self.averaging}, but all {self.epochs} epochs are frozen and there is nothing "
                "to average; lower schedule.frozen_epochs, or set it to 0."
            )
        object.__setattr__(self, "progressive", tuple(self.progressive))
        for bits in self.progressive:
            _require_choice("schedule.progressive", bits, BIT_WIDTHS)
        if list(self.progressive) != sorted(set(self.progressive), reverse=True):
            raise TrainingError(f"schedule.progressive is {list(self.progressive)}; widths have to fall, as in [8, 4].")
        live = self.epochs - self.frozen_epochs
        if self.progressive and self.epochs > 0 and live <= len(self.progressive):
            raise TrainingError(
                f"schedule.progressive has {len(self.progressive)} widths before the final ones, and there are {live} "
                f"live epochs (schedule.epochs less schedule.frozen_epochs); {len(self.progressive) + 1} is the least."
            )
        if self.frozen_epochs > self.epochs:
            raise TrainingError(
                f"schedule.frozen_epochs is {self.frozen_epochs}, more than schedule.epochs ({self.epochs}); lower it."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run, whole.

    method: mec (LSQ plus the coding objective), lsq, lsq+ (which implies quant.zero_point learned), pact, dorefa
    (docs/baselines.md), or fp32 (the full-precision stage alone).
    weights: what to start from instead of random weights: a checkpoint of ours, a state dict, or the name of
    torchvision's published weights (DEFAULT, IMAGENET1K_V1, ...); empty for none.
    """

    method: str = "mec"
    seed: int = 0
    device: str = "auto"
    weights: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    mec: MecConfig = field(default_factory=MecConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        _require_choice("method", self.method, METHODS)
        if self.method in RULES and RULES[self.method].learned_zero_points:
            object.__setattr__(self, "quant", replace(self.quant, zero_point="learned"))
        _require_choice("device", self.device, DEVICES)
        _require_at_least("seed", self.seed, 0)
        if self.quant.freezing and self.schedule.averaging:
            raise TrainingError(
                f"quant.freezing is {self.quant.freezing} and schedule.averaging {self.schedule.averaging}; an average "
                "would move weights that are frozen. Set one of them to 0."
            )
        if self.data.labels == "none":
            self._require_teaching()
        self._require_widths_to_fall()
        self._require_learned_weight_steps()
        self._require_grid()
        if self.schedule.compile and self.quant.zero_point == "learned":
            raise TrainingError(
                "schedule.compile is true and quant.zero_point learned (method lsq+ has it so); a compiled graph "
                "cannot read a zero point that moves. Set one of them to its default (false, fixed)."
            )

    def _require_learned_weight_steps(self) -> None:
        """DoReFa's weights have no step of their own to round to, and at 8 bits no codes that fit a byte."""
        asked = {
            "quant.damping": self.quant.damping,
            "quant.freezing": self.quant.freezing,
            "schedule.progressive": list(self.schedule.progressive),
        }
        for key, value in asked.items():
            if value and self.method in RULES and RULES[self.method].weights == "dorefa":
                raise TrainingError(
                    f"{key} is {value}, which needs weights with step sizes, and method {self.method} has DoReFa's; "
                    "leave it out, or choose mec, lsq or lsq+."
                )

    def _require_grid(self) -> None:
        """What works with the plain range alone, or with fixed grids."""
        quant, schedule = self.quant, self.schedule
        has_levels = quant.weight_grid != "uniform" or 1 in quant.all_weight_bits
        shown = f"quant.weight_grid is {quant.weight_grid} and quant.weight_bits {quant.weight_bits}"
        if schedule.compile and quant.weight_grid in TABLE_GRIDS:
            raise TrainingError(
                f"schedule.compile is true and quant.weight_grid {quant.weight_grid}; nothing compares the gradients "
                "of compiled table look-ups. Set one of them to its default (false, uniform)."
            )
        if has_levels and schedule.progressive:
            raise TrainingError(
                f"{shown}, and schedule.progressive is {list(schedule.progressive)}; wider forms of that grid are no "
                "int8. Leave schedule.progressive out, or train on the uniform grid."
            )
        if has_levels and quant.freezing:
            raise TrainingError(
                f"{shown}, and quant.freezing is {quant.freezing}; the running mean that it rounds need not be near a "
                "level of that grid. Set quant.freezing = 0, or train on the uniform grid."
            )
        if has_levels and self.method in RULES and RULES[self.method].weights == "dorefa":
            raise TrainingError(
                f"{shown}, and method is {self.method}, whose weights have a grid of their own. Set quant.weight_grid "
                'to "uniform" and at least 2 bits, or choose another method.'
            )

    def _require_widths_to_fall(self) -> None:
        quant, widths = self.quant, self.schedule.progressive
        final = [quant.weight_bits, quant.act_bits, *(b for each in quant.overrides.values() for b in each.values())]
        if widths and widths[-1] <= min(final):
            raise TrainingError(
                f"schedule.progressive ends at {widths[-1]} bits, and no final width is below that; leave it out."
            )
        if widths and (quant.damping or quant.freezing):
            key = "damping" if quant.damping else "freezing"
            raise TrainingError(
                f"quant.{key} is {getattr(quant, key)} and schedule.progressive {list(widths)}; where widths change, "
                "integers before and after are not the same ones. Leave one of them out."
            )

    @property
    def network(self) -> ModelConfig:
        """The model section as the network is built: published weights go with the published stem."""
        if self.model.stem == "auto" and are_published(self.weights):
            return replace(self.model, stem="standard")
        return self.model

    def _require_teaching(self) -> None:
        """Without labels there has to be a teacher, and something of it in the loss."""
        unlabelled = "data.labels is none"
        if self.method == "fp32":
            raise TrainingError(
                f"{unlabelled}, and method fp32 needs labels; choose mec or lsq, with weights to be quantised."
            )
        if not self.weights:
            raise TrainingError(
                f"{unlabelled}, so that a trained network has to teach; name one in weights (--weights): a checkpoint, "
                "a state dict or published weights."
            )
        if self.schedule.fp_epochs:
            raise TrainingError(
                f"{unlabelled}, and the full-precision epochs (schedule.fp_epochs is {self.schedule.fp_epochs}) need "
                "labels; set schedule.fp_epochs = 0 (--fp-epochs 0)."
            )
        mec = self.mec
        coded = self.method == "mec" and mec.views == "teacher" and "features" in mec.code and mec.beta > 0
        if not (self.distill.weight > 0 or coded):
            raise TrainingError(
                f"{unlabelled}, and nothing in the loss comes from the teacher; set distill.weight = 1 (--distill 1), "
                'or method = "mec" with mec.views = "teacher".'
            )

    def describe(self) -> dict[str, Any]:
        """The config as plain nested dicts and lists, ready for TOML or JSON."""
        described: dict[str, Any] = _plain(self)
        return described

    @classmethod
    def from_description(cls, described: Mapping[str, Any]) -> TrainConfig:
        """The config that `describe` gave, also in an older version: what it did not know has its default.

        Raises TypeError for a key of no version, TrainingError for a value out of range.
        """
        built = {RENAMED.get(key, key): value for key, value in described.items()}
        for section in fields(cls):
            make: Any = section.default_factory
            if make is not MISSING:
                built[section.name] = make(**built.get(section.name, {}))
        return cls(**built)


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {key: _plain(getattr(value, key)) for key in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
