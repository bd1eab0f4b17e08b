"""The sections of a run's config: one frozen dataclass each, which refuses what is wrong within it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mecdeploy.training.config_values import (
    BIT_WIDTHS,
    CODED_TENSORS,
    FORMS,
    LABELS,
    LAYER_WIDTHS,
    STEMS,
    TWO_BIT_GRIDS,
    VALIDATIONS,
    VIEWS,
    WEIGHT_GRIDS,
    ZERO_POINTS,
    require_at_least,
    require_choice,
)
from mecdeploy.training.errors import TrainingError


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
        require_at_least("data.image_size", self.image_size, 0)
        require_choice("data.labels", self.labels, LABELS)
        require_choice("data.validation", self.validation, VALIDATIONS)
        if not 0.0 < self.validation_fraction < 1.0:
            raise TrainingError(f"data.validation_fraction is {self.validation_fraction}; it must lie between 0 and 1.")
        if not 0.0 < self.fraction <= 1.0:
            raise TrainingError(f"data.fraction is {self.fraction}; it must be more than 0 and at most 1.")
        require_at_least("data.workers", self.workers, 0)


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
        require_choice("model.stem", self.stem, STEMS)
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
            require_choice(f"quant.{key}", getattr(self, key), LAYER_WIDTHS)
        for key in ("first_last_bits", "skip_bits"):
            require_choice(f"quant.{key}", getattr(self, key), BIT_WIDTHS)
        require_choice("quant.weight_grid", self.weight_grid, WEIGHT_GRIDS)
        if self.weight_grid in TWO_BIT_GRIDS and self.weight_bits != 2:
            raise TrainingError(
                f"quant.weight_grid is {self.weight_grid}, which has 2 bits, and quant.weight_bits {self.weight_bits}; "
                "set quant.weight_bits = 2."
            )
        require_choice("quant.zero_point", self.zero_point, ZERO_POINTS)
        object.__setattr__(self, "float_layers", tuple(self.float_layers))
        require_at_least("quant.damping", self.damping, 0.0)
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
                require_choice(f"quant.overrides.{pattern!r}.{key}", bits, LAYER_WIDTHS)
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
            require_choice("mec.code", name, CODED_TENSORS)
        require_choice("mec.form", self.form, FORMS)
        require_choice("mec.views", self.views, VIEWS)
        for key, minimum in (
            ("beta", 0.0),
            ("experts", 1),
            ("order", 1),
            ("samples", 2),
            ("warmup", 0.0),
            ("decay", 0.0),
        ):
            require_at_least(f"mec.{key}", getattr(self, key), minimum)
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
