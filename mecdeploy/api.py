"""What a notebook calls. Each function composes the rooms and returns a report; nothing here prints.

A run is named by its folder. Rooms are imported inside the functions, so that naming one pays for no other.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mecdeploy import event_files, run_folder, triton_layout
from mecdeploy.certificate import CHECKPOINT_DIGEST, certify, compare, metadata_of, model_file, validation_images
from mecdeploy.config import require_same_run
from mecdeploy.errors import UserError
from mecdeploy.training.config import TrainConfig
from mecdeploy.training.events import EpochEvent, Event, StageEvent, WarningEvent
from mecdeploy.training.world import joined

LAYOUTS = ("file", "triton")

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mecdeploy.runtime_checks import InspectionReport, ParityReport
    from mecdeploy.training.loop import TrainResult
    from mecdeploy.training.model import QuantizedModel
    from mecdeploy.training.run import LoadedRun


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """The file that an export wrote.

    size: bytes. weight_bits: unit -> bits its weights are packed at, in execution order.
    activation_bits: value -> bits of its integers. islands: what runs in float, name -> its operators.
    """

    path: Path
    size: int
    target: str
    input: str
    weight_bits: dict[str, int]
    activation_bits: dict[str, int]
    islands: dict[str, tuple[str, ...]]


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    report: Callable[[Event], None] | None = None,
    tensorboard: bool = False,
) -> TrainResult:
    """Train a run into the folder `out`: run.toml, metrics.jsonl and checkpoints.

    resume: continue the run in `out`; the config must be the one it was started with (the device may differ).
    report: called with every event of the loop, in this process, between steps.
    tensorboard: also write event files to `out`/tensorboard; a resumed run that has some goes on with them.
    Raises UserError, TrainingError or OSError; nothing is left in `out` then, unless there is a checkpoint to keep.
    Raises TrainingInterrupted after Ctrl-C, with a checkpoint saved.

    Processes that torchrun started train the run together, if each calls this alike (docs/scale.md): process 0 touches
    `out` and calls `report`; PeerFailed is raised where it is another one that raises one of the above.
    """
    path = Path(out)
    with ExitStack() as stack:
        world = stack.enter_context(joined())
        drawn = world.from_main(lambda: event_files.wanted(path, tensorboard, resume))
        opened = run_folder.reopen(path) if resume else run_folder.create(path, config)
        folder = world.from_main(lambda: stack.enter_context(opened))
        if resume:
            world.from_main(lambda: require_same_run(config, folder.read_config(), str(path)))
        from mecdeploy.training.data import load_dataset
        from mecdeploy.training.device import choose_device
        from mecdeploy.training.loop import train as run_stages
        from mecdeploy.training.teacher_classes import classes_of_weights, recorded_classes

        # Before minutes of decoding images, not after.
        world.everywhere(lambda: choose_device(config.device, world.launch))
        unlabelled = config.data.labels == "none"
        recorded = world.from_main(lambda: recorded_classes(path)) if resume and unlabelled else None
        dataset = world.local_first(
            lambda: load_dataset(
                config.data, seed=config.seed, classes=lambda shape: recorded or classes_of_weights(config, shape)
            )
        )

        tell = report or (lambda event: None)
        curves = event_files.EventFiles(path, config.schedule) if drawn and world.main else None
        if curves is not None:
            stack.callback(curves.close)

        def record(event: Event) -> None:
            _record(folder.metrics, event, tell)
            if curves is not None:
                curves.record(event, tell)
            tell(event)

        result = run_stages(
            config, dataset, path, resume=resume, report=record, accept=_require_exportable, world=world
        )
        if world.main:
            _complete(folder.metrics, result, tell)
        return result


def _require_exportable(model: QuantizedModel) -> None:
    """Refuse what torch.onnx cannot write, with an ExportError, while no time has been spent on training it."""
    if model.islands():
        from mecdeploy.export import lower

        lower(model)


def export(
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
    """Write a trained network as one ONNX file with packed weights, replacing an older file.

    run: the folder of a finished run, or a network of your own from `prepare`.
    out: by default RUN/model.onnx; a network of your own has no default.
    bits: width at which low-bit weights are packed; None packs each at the width it was trained at.
    target: onnxruntime (1.24 or newer) or portable (onnxruntime from 1.18, OpenVINO). input: uint8 or float.
    class_names: of a network of your own; a run has its own.
    layout: file, or triton, for the next version of a model in a Triton model repository: `out` is then the repository,
    by default RUN/triton, and `name` the model, by default called like the run's folder.
    Raises UserError for a folder that is no run, TrainingError for a run that has not finished QAT, ExportError for
    what cannot be exported, OSError for a place that cannot be written.
    """
    folder = _run_folder(run)
    if folder is None and out is None:
        raise UserError("a network of your own has no run folder; give out=, the file to write.")
    from mecdeploy.export import ExportConfig, export_model, lower

    config = ExportConfig(bits=bits, target=target, input=input)
    if layout not in LAYOUTS:
        raise UserError(f"export.layout is {layout!r}; choose one of {', '.join(LAYOUTS)}.")
    if layout == "triton":
        name = triton_layout.model_name(name, None if folder is None else folder.path)
    elif name is not None:
        raise UserError(f"--name {name} is that of a model in a Triton repository; add --layout triton, or use --out.")
    network, metadata = cast("QuantizedModel", run), {}
    if folder is not None:
        loaded = _load(folder)
        network, class_names = loaded.model, loaded.class_names
        metadata[CHECKPOINT_DIGEST] = loaded.sha256
    if class_names is not None:
        metadata["mecdeploy.class_names"] = json.dumps(list(class_names), ensure_ascii=False)
    content = export_model(lower(network), config, metadata)
    default = run_folder.MODEL if name is None else "triton"
    path = Path(out) if out is not None else cast(run_folder.RunFolder, folder).path / default
    if name is None:
        run_folder.write_atomically(path, content)
    else:
        path = triton_layout.add_version(path, name, content)
    return _describe(path, content, config.target, config.input)


def check(
    run: str | Path | QuantizedModel,
    model: str | Path | None = None,
    *,
    images: NDArray[np.uint8] | None = None,
    labels: NDArray[np.int64] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ParityReport:
    """Compare an exported file with the network it came from.

    run: the folder of a finished run, whose validation images are used (without accuracies where they have no labels)
    and into which parity.json is written; or a network of your own from `prepare`. model: by default RUN/model.onnx.
    images: uint8 [n, C, H, W], labels: [n], both for a network of your own only.
    progress: called with (what, done, total). Raises UserError for a folder that is no run, TrainingError for one that
    has not finished QAT, CheckError for a file that is not ours or cannot be read. A file that computes something else
    is no error: the report's `passed` is False and its `failures` say why.
    """
    folder = _run_folder(run)
    if folder is None:
        if model is None or images is None or labels is None:
            raise UserError("a network of your own has no run folder; give the model file, images= and labels=.")
        return compare(Path(model), cast("QuantizedModel", run), images, labels, progress)
    if images is not None or labels is not None:
        raise UserError("a run is checked on its own validation images; leave out images= and labels=.")
    path = model_file(folder, model)
    loaded = _load(folder)
    return certify(folder, loaded, path, validation_images(folder.read_config(), loaded.class_names), progress)


def inspect(model: str | Path) -> InspectionReport:
    """Say what is in any ONNX file and what onnxruntime makes of it: kernels, float islands with reasons, bytes.

    Raises CheckError for what is no ONNX file; one that onnxruntime refuses is, and `report.runtime.error` says why.
    """
    from mecdeploy.runtime_checks import inspect_model

    return inspect_model(model)


def _run_folder(run: str | Path | QuantizedModel) -> run_folder.RunFolder | None:
    """The run's folder, refused if it is none; None for a network."""
    return run_folder.require_run(Path(run)) if isinstance(run, str | Path) else None


def _load(folder: run_folder.RunFolder) -> LoadedRun:
    from mecdeploy.training.run import load_run

    return load_run(folder.path, model_name=folder.read_config().model.name)


def _record(metrics: run_folder.Metrics, event: Event, tell: Callable[[Event], None]) -> None:
    """Keep metrics.jsonl in step with the run: one line per epoch, none twice after a resume.

    A full disk costs lines, not the run: `tell` gets a warning, and `_complete` writes what is missing.
    """
    try:
        if isinstance(event, StageEvent):
            here = event.stages.index(event.stage)
            done = {stage: run_folder.ALL for stage in event.stages[:here]}
            metrics.trim({**done, event.stage: event.epoch})
        elif isinstance(event, EpochEvent):
            metrics.append(dataclasses.asdict(event))
    except OSError as error:
        tell(_unwritten(error, "training goes on, and writes its missing lines at the end."))


def _complete(metrics: run_folder.Metrics, result: TrainResult, tell: Callable[[Event], None]) -> None:
    """After the run, metrics.jsonl holds every epoch once, whatever befell it on the way."""
    try:
        metrics.replace(dataclasses.asdict(event) for event in result.history)
    except OSError as error:
        tell(_unwritten(error, "make room and resume the finished run to have it completed."))


def _unwritten(error: OSError, consequence: str) -> WarningEvent:
    return WarningEvent(message=f"{run_folder.METRICS} could not be written ({error.strerror or error}); {consequence}")


def _describe(path: Path, content: bytes, target: str, input: str) -> ExportReport:
    """Read the bits back from the file itself, not from what was asked for."""
    metadata = metadata_of(content)
    return ExportReport(
        path=path,
        size=len(content),
        target=target,
        input=input,
        weight_bits=json.loads(metadata["mecdeploy.weight_bits"]),
        activation_bits=json.loads(metadata["mecdeploy.activation_bits"]),
        islands={
            name: tuple(island["operators"])
            for name, island in json.loads(metadata.get("mecdeploy.islands", "{}")).items()
        },
    )
