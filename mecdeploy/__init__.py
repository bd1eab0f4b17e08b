"""mecdeploy: quantisation-aware training that ends in a file people can serve.

The public API, loaded on first use so that `import mecdeploy` costs nothing:

    train(config, out)              a run folder with checkpoints
    compare(config, out)            methods x bits x seeds, each method against a baseline
    sensitivity(run, size=...)      which layers need their bits, and widths for a size
    representation(run)             how a run uses its codes and spreads its features
    hessian(run)                    how sharp its minimum is
    export(run)                     one ONNX file with packed low-bit weights
    check(run)                      proof that onnxruntime computes what PyTorch trained
    inspect(model)                  what is in any ONNX file, and what onnxruntime makes of it
    report(run)                     one HTML page about all of it
    predict(model, images)          onnxruntime alone
    bench(model, against=...)       load time, memory, latency and throughput in onnxruntime, beside others'
    prepare(model, config, spec)    quantise a network of your own; then calibrate, your training loop, export, check
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# A wheel holds the rooms inside this package, a checkout holds them beside it.
if not (Path(__file__).parent / "training").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mecdeploy.api import ExportReport, check, export, inspect, train
    from mecdeploy.benchmark import BenchReport, bench
    from mecdeploy.config import read_config
    from mecdeploy.measures import HessianReport, RepresentationReport, hessian, representation
    from mecdeploy.prediction import Prediction, predict
    from mecdeploy.run_report.writing import RunReport, report
    from mecdeploy.sensitivity_study import SensitivityReport, sensitivity
    from mecdeploy.study.compare import compare
    from mecdeploy.study.report import StudyReport
    from mecdeploy.training.calibration import calibrate
    from mecdeploy.training.config import (
        DataConfig,
        DistillConfig,
        MecConfig,
        ModelConfig,
        QuantConfig,
        ScheduleConfig,
        TrainConfig,
    )
    from mecdeploy.training.input_spec import InputSpec
    from mecdeploy.training.model import QuantizedModel
    from mecdeploy.training.preparation import prepare

_HOMES = {
    "mecdeploy.api": ("ExportReport", "check", "inspect", "train"),
    "mecdeploy.benchmark": ("BenchReport", "bench"),
    "mecdeploy.config": ("read_config",),
    "mecdeploy.measures": ("HessianReport", "RepresentationReport", "hessian", "representation"),
    "mecdeploy.prediction": ("Prediction", "predict"),
    "mecdeploy.run_report.writing": ("RunReport", "report"),
    "mecdeploy.sensitivity_study": ("SensitivityReport", "sensitivity"),
    "mecdeploy.study.compare": ("compare",),
    "mecdeploy.study.report": ("StudyReport",),
    "mecdeploy.training.config": (
        "DataConfig",
        "DistillConfig",
        "MecConfig",
        "ModelConfig",
        "QuantConfig",
        "ScheduleConfig",
        "TrainConfig",
    ),
    "mecdeploy.training.calibration": ("calibrate",),
    "mecdeploy.training.model": ("QuantizedModel",),
    "mecdeploy.training.preparation": ("prepare",),
    "mecdeploy.training.input_spec": ("InputSpec",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BenchReport",
    "DataConfig",
    "DistillConfig",
    "ExportReport",
    "HessianReport",
    "InputSpec",
    "MecConfig",
    "ModelConfig",
    "Prediction",
    "QuantConfig",
    "QuantizedModel",
    "RepresentationReport",
    "RunReport",
    "ScheduleConfig",
    "SensitivityReport",
    "StudyReport",
    "TrainConfig",
    "__version__",
    "bench",
    "calibrate",
    "check",
    "compare",
    "export",
    "hessian",
    "inspect",
    "predict",
    "prepare",
    "read_config",
    "report",
    "representation",
    "sensitivity",
    "train",
]


class _ExportRoom(ModuleType):
    """The export room, callable: `mecdeploy.export` is a folder of the package and a verb of its API at once."""

    def __call__(
        self,
        run: str | Path | QuantizedModel,
        *,
        out: str | Path | None = None,
        bits: int | None = None,
        target: str = "onnxruntime",
        input: str = "uint8",
        class_names: Sequence[str] | None = None,
        layout: str = "file",
        name: str | None = None,
    ) -> ExportReport:
        from mecdeploy.api import export

        return export(
            run, out=out, bits=bits, target=target, input=input, class_names=class_names, layout=layout, name=name
        )


class _FrontDoor(ModuleType):
    """This module: the import system sets a loaded room as an attribute here, and the export room so gets its call."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "export" and isinstance(value, ModuleType):
            value.__class__ = _ExportRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _FrontDoor


def __getattr__(name: str) -> Any:
    if name == "export":
        return import_module("mecdeploy.export")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
