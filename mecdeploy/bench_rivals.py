"""What `mecdeploy bench` times a model against: files, and the full-precision network of a run, as it is or in int8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mecdeploy.errors import UserError
from mecdeploy.run_folder import CONFIG, require_run
from mecdeploy.training.names import user_file

if TYPE_CHECKING:
    from mecdeploy.training.run import LoadedRun

FLOAT, STATIC = "fp32", "int8"
CALIBRATION_IMAGES = 8
"""Random ones: what the scales are changes no kernel, and so no time."""


def gather(
    model: Path, against: Sequence[str], *, run: Path | None, folder: Path, say: Callable[[str], None]
) -> dict[str, Path]:
    """The files to time, the model first, by what the user called them; what has to be written goes into `folder`.

    Raises UserError for what is no file, no run and no word that is known, before anything is written; CheckError for
    a model that cannot be read.
    """
    from mecdeploy.runtime_checks import read_inputs

    if model.is_dir():
        raise UserError(f"{model} is a folder; give the model file in it, such as {model / 'model.onnx'}.")
    resolved = [(name, _resolve(name, model, run)) for name in against]
    read_inputs(model)  # before the time that it takes to write another
    wanted = [(str(model), model)]
    opened: dict[Path, tuple[LoadedRun, Path]] = {}
    for index, (name, found) in enumerate(resolved):
        if isinstance(found, Path):
            wanted.append((name, found))
            continue
        source, kind = found
        if source not in opened:
            network = require_run(source).read_config().model.name
            executed = user_file(network)
            if executed is not None:
                say(f"Executing {executed[0].absolute()} (model.name is {network})")
            say(f"Writing the full-precision network of {source}")
            path = folder / f"{index}-{FLOAT}.onnx"
            opened[source] = _write_float(source, network, path), path
        path = opened[source][1]
        if kind == STATIC:
            say("Quantising it with onnxruntime's quantize_static")
            path = folder / f"{index}-{STATIC}.onnx"
            _write_static(*opened[source], path)
        wanted.append((name if name in (FLOAT, STATIC) else f"{name} ({kind})", path))
    return _named_apart(wanted)


def _resolve(name: str, model: Path, run: Path | None) -> Path | tuple[Path, str]:
    """A file; or a run and what to write of it."""
    if name in (FLOAT, STATIC):
        if run is None and not (model.parent / CONFIG).is_file():
            raise UserError(
                f"--against {name} is the full-precision network of a run, and {model} lies in no run folder; "
                "give --run RUN, or a file of your own."
            )
        return require_run(run if run is not None else model.parent).path, name
    path = Path(name)
    if path.is_dir():
        return require_run(path).path, FLOAT
    if not path.is_file():
        raise UserError(f"--against {name}: no such file or run folder; give an ONNX file, a run, {FLOAT} or {STATIC}.")
    return path


def _write_float(run: Path, network: str, path: Path) -> LoadedRun:
    import onnx

    from mecdeploy.float_baseline import float_onnx
    from mecdeploy.static_int8 import name_global_pools
    from mecdeploy.training.run import load_run

    loaded = load_run(run, model_name=network)
    spec = loaded.spec
    proto = onnx.load_from_string(
        float_onnx(loaded.float_model, channels=spec.channels, height=spec.height, width=spec.width)
    )
    name_global_pools(proto.graph)
    path.write_bytes(proto.SerializeToString())
    return loaded


def _write_static(run: LoadedRun, float_model: Path, path: Path) -> None:
    import torch

    from mecdeploy.static_int8 import write_static_int8

    shape = (CALIBRATION_IMAGES, run.spec.channels, run.spec.height, run.spec.width)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_static_int8(float_model, run.spec.normalize(pixels).numpy(), path)


def _named_apart(wanted: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """By name; one that comes again gets a number, so that a file may be timed against itself."""
    named: dict[str, Path] = {}
    for name, path in wanted:
        count, unique = 1, name
        while unique in named:
            count += 1
            unique = f"{name} ({count})"
        named[unique] = path
    return named
