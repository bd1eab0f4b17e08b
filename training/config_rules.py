"""What sections of a run's config ask of each other: a combination that cannot work is refused before it is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mecdeploy.training.config_values import TABLE_GRIDS
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.methods import RULES

if TYPE_CHECKING:
    from mecdeploy.training.config import TrainConfig


def require_coherent(config: TrainConfig) -> None:
    """Raise TrainingError for the first combination that cannot work."""
    _require_stages(config)
    _require_weights_free_to_average(config)
    if config.data.labels == "none":
        _require_teaching(config)
    _require_trained_teacher(config)
    _require_widths_to_fall(config)
    _require_learned_weight_steps(config)
    _require_grid(config)
    _require_fixed_zero_points(config)


def _require_stages(config: TrainConfig) -> None:
    """What works on the quantised stages alone is not left out in silence where there are none."""
    asked = {
        "schedule.averaging": config.schedule.averaging,
        "schedule.progressive": list(config.schedule.progressive),
        "quant.damping": config.quant.damping,
        "quant.freezing": config.quant.freezing,
        "distill.weight": config.distill.weight,
    }
    for key, value in asked.items():
        if value and config.method == "fp32":
            raise TrainingError(
                f"{key} is {value}, which acts while a network is quantised, and method fp32 quantises none; leave it "
                "out, or choose another method."
            )


def _require_weights_free_to_average(config: TrainConfig) -> None:
    if config.quant.freezing and config.schedule.averaging:
        raise TrainingError(
            f"quant.freezing is {config.quant.freezing} and schedule.averaging {config.schedule.averaging}; an average "
            "would move weights that are frozen. Set one of them to 0."
        )


def _require_teaching(config: TrainConfig) -> None:
    """Without labels there has to be a teacher, and something of it in the loss."""
    unlabelled = "data.labels is none"
    if config.method == "fp32":
        raise TrainingError(
            f"{unlabelled}, and method fp32 needs labels; choose mec or lsq, with weights to be quantised."
        )
    if not config.weights:
        raise TrainingError(
            f"{unlabelled}, so that a trained network has to teach; name one in weights (--weights): a checkpoint, "
            "a state dict or published weights."
        )
    if config.schedule.fp_epochs:
        raise TrainingError(
            f"{unlabelled}, and the full-precision epochs (schedule.fp_epochs is {config.schedule.fp_epochs}) need "
            "labels; set schedule.fp_epochs = 0 (--fp-epochs 0)."
        )
    if not _learns_from_teacher(config):
        raise TrainingError(
            f"{unlabelled}, and nothing in the loss comes from the teacher; set distill.weight = 1 (--distill 1), "
            'or method = "mec" with mec.views = "teacher".'
        )


def _require_trained_teacher(config: TrainConfig) -> None:
    if _learns_from_teacher(config) and not config.weights and not config.schedule.fp_epochs:
        key = "mec.views is teacher"
        if config.distill.weight > 0:
            key = f"distill.weight is {config.distill.weight}"
        raise TrainingError(
            f"{key}, and the full-precision network that teaches is random: schedule.fp_epochs is 0, and there are no "
            "weights. Name some in weights (--weights), or set schedule.fp_epochs."
        )


def _learns_from_teacher(config: TrainConfig) -> bool:
    mec = config.mec
    coded = config.method == "mec" and mec.views == "teacher" and "features" in mec.code and mec.beta > 0
    return config.distill.weight > 0 or coded


def _require_widths_to_fall(config: TrainConfig) -> None:
    quant, widths = config.quant, config.schedule.progressive
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


def _require_learned_weight_steps(config: TrainConfig) -> None:
    """DoReFa's weights have no step of their own to round to, and at 8 bits no codes that fit a byte."""
    asked = {
        "quant.damping": config.quant.damping,
        "quant.freezing": config.quant.freezing,
        "schedule.progressive": list(config.schedule.progressive),
    }
    for key, value in asked.items():
        if value and config.method in RULES and RULES[config.method].weights == "dorefa":
            raise TrainingError(
                f"{key} is {value}, which needs weights with step sizes, and method {config.method} has DoReFa's; "
                "leave it out, or choose mec, lsq or lsq+."
            )


def _require_grid(config: TrainConfig) -> None:
    """What works with the plain range alone, or with fixed grids."""
    quant, schedule = config.quant, config.schedule
    has_levels = quant.weight_grid != "uniform" or 1 in quant.all_weight_bits
    shown = f"quant.weight_grid is {quant.weight_grid} and quant.weight_bits {quant.weight_bits}"
    if quant.weight_grid != "uniform" and min(*quant.all_weight_bits, quant.first_last_bits) == 8:
        raise TrainingError(
            f"{shown}: a grid is that of weights below 8 bits, and there are none. Lower quant.weight_bits, or leave "
            "quant.weight_grid out."
        )
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
    if has_levels and config.method in RULES and RULES[config.method].weights == "dorefa":
        raise TrainingError(
            f"{shown}, and method is {config.method}, whose weights have a grid of their own. Set quant.weight_grid "
            'to "uniform" and at least 2 bits, or choose another method.'
        )


def _require_fixed_zero_points(config: TrainConfig) -> None:
    if config.schedule.compile and config.quant.zero_point == "learned":
        raise TrainingError(
            "schedule.compile is true and quant.zero_point learned (method lsq+ has it so); a compiled graph "
            "cannot read a zero point that moves. Set one of them to its default (false, fixed)."
        )
