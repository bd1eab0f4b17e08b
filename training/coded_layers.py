"""Which units the coding objective sees: mec.layers, resolved against a network."""

from __future__ import annotations

from fnmatch import fnmatchcase

from mecdeploy.training.config import MecConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.movement import DequantizeUnit, FloatUnit
from mecdeploy.training.names import no_match
from mecdeploy.training.units import Unit, WeightedUnit


def coded_layers(model: QuantizedModel, config: MecConfig) -> tuple[str, ...]:
    """Names of the units that config.layers names, in execution order; empty, for all of them, where it names none.

    Raises TrainingError for a pattern that matches no unit, and where no unit that is left has a kind of tensor that
    config.code asks for.
    """
    units = model.units()
    for pattern in config.layers:
        if not any(fnmatchcase(name, pattern) for name in units):
            raise TrainingError(no_match("mec.layers", pattern, list(units)))
    chosen = {name: unit for name, unit in units.items() if any(fnmatchcase(name, p) for p in config.layers)}
    for kind, makes in (("activations", _makes_codes), ("weights", _has_weights)):
        if chosen and kind in config.code and not any(makes(unit) for unit in chosen.values()):
            raise TrainingError(
                f"mec.code asks for {kind}, and mec.layers leaves {', '.join(chosen)}, which has none; take {kind} out "
                "of mec.code, or name further layers."
            )
    return tuple(chosen)


def _makes_codes(unit: Unit) -> bool:
    logits = isinstance(unit, WeightedUnit) and unit.output is None
    return not logits and not isinstance(unit, DequantizeUnit | FloatUnit)


def _has_weights(unit: Unit) -> bool:
    return isinstance(unit, WeightedUnit)
