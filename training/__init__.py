"""The training room: quantisation-aware training, from numbers to a finished run.

    lsq.py           learned step sizes: pure functions;  fused.py: in one pass;  composed.py: twice differentiable
    quantizers.py    the modules of activations;  weight_quantizers.py: of weights, on weight_grids.py's grids
    methods.py       which rules a method goes by: LSQ, LSQ+, PACT, DoReFa
    deployed.py      the arithmetic of onnxruntime's integer kernels, differentiable
    units.py         quantised units: one unit is one integer kernel at run time;  movement.py: those that round nothing
    tracing.py       float module -> flat graph of PyTorch's operators, by torch.export (exporting.py)
    planning.py      flat graph -> plans of units (plans.py), by the rules in operators.py;  islands.py: the rest
    widths.py        at which width every value is stored and read;  normalization.py: the image's, folded
    preparation.py   float model -> QuantizedModel (model.py);  calibration.py: its first step sizes
    coding.py        coding rates;  mec.py: the maximum-entropy-coding objective made of them
    distillation.py  the full-precision network as the teacher of the quantised one
    data/            images in memory or streamed;  models/: the networks a config can name
    averaging.py     an average of the weights;  oscillation.py, progressive.py: other switches of training
    loop.py          the stages of a run;  session.py: its steps, over a State (state.py);  checkpoint.py: what survives
    config.py        what a run can be told
    config_values.py, config_sections.py, config_schedule.py, config_rules.py: its choices, sections and combinations
    representation.py, flatness.py   what can be measured of a finished run beside its accuracy
    seeding.py       one seed, derived for every step: nothing random has a state to lose

Names below load on first use, so that reading a config costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from mecdeploy.training.config import (
    DataConfig,
    DistillConfig,
    MecConfig,
    ModelConfig,
    QuantConfig,
    ScheduleConfig,
    TrainConfig,
)
from mecdeploy.training.errors import TrainingError

if TYPE_CHECKING:
    from mecdeploy.training.calibration import calibrate
    from mecdeploy.training.data import load_dataset
    from mecdeploy.training.input_spec import InputSpec
    from mecdeploy.training.loop import train
    from mecdeploy.training.model import QuantizedModel
    from mecdeploy.training.models import available_models, build_model
    from mecdeploy.training.preparation import prepare
    from mecdeploy.training.run import load_run

__all__ = [
    "DataConfig",
    "DistillConfig",
    "InputSpec",
    "MecConfig",
    "ModelConfig",
    "QuantConfig",
    "QuantizedModel",
    "ScheduleConfig",
    "TrainConfig",
    "TrainingError",
    "available_models",
    "build_model",
    "calibrate",
    "load_dataset",
    "load_run",
    "prepare",
    "train",
]

_HOMES = {
    "InputSpec": "units",
    "QuantizedModel": "model",
    "available_models": "models",
    "build_model": "models",
    "calibrate": "calibration",
    "load_dataset": "data",
    "load_run": "run",
    "prepare": "preparation",
    "train": "loop",
}


def __getattr__(name: str) -> object:
    """Load a name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
