"""The values that a config can name, and how others are refused."""

from __future__ import annotations

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.methods import RULES

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


def require_choice(key: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a value that is none of the choices. key: dotted, as in run.toml."""
    if value not in choices:
        listed = ", ".join(str(choice) for choice in choices)
        raise TrainingError(f"{key} is {value!r}; choose one of {listed}.")


def require_at_least(key: str, value: float, minimum: float) -> None:
    """Refuse a number below the minimum, and one that is none."""
    if not value >= minimum:
        raise TrainingError(f"{key} is {value}; it must be at least {minimum}.")
