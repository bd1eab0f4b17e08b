"""What a training run can be told: all sections of it together, validated where they are made.

Imports no torch, so that the command line can read and refuse a config before it pays for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from mecdeploy.training.config_rules import require_coherent
from mecdeploy.training.config_schedule import ScheduleConfig
from mecdeploy.training.config_sections import (
    DataConfig,
    DistillConfig,
    MecConfig,
    ModelConfig,
    QuantConfig,
)
from mecdeploy.training.config_values import (
    BIT_WIDTHS,
    CODED_TENSORS,
    DEVICES,
    LAYER_WIDTHS,
    METHODS,
    require_at_least,
    require_choice,
)
from mecdeploy.training.methods import RULES
from mecdeploy.training.names import are_published

__all__ = [
    "BIT_WIDTHS",
    "CODED_TENSORS",
    "LAYER_WIDTHS",
    "METHODS",
    "RENAMED",
    "DataConfig",
    "DistillConfig",
    "MecConfig",
    "ModelConfig",
    "QuantConfig",
    "ScheduleConfig",
    "TrainConfig",
]

RENAMED = {"init": "weights"}
"""Keys of older configs and checkpoints -> what they are now."""


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
        require_choice("method", self.method, METHODS)
        if self.method in RULES and RULES[self.method].learned_zero_points:
            object.__setattr__(self, "quant", replace(self.quant, zero_point="learned"))
        require_choice("device", self.device, DEVICES)
        require_at_least("seed", self.seed, 0)
        require_coherent(self)

    @property
    def network(self) -> ModelConfig:
        """The model section as the network is built: published weights go with the published stem."""
        if self.model.stem == "auto" and are_published(self.weights):
            return replace(self.model, stem="standard")
        return self.model

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
