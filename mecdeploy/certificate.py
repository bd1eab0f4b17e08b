"""A run's check and what it certifies: parity.json says of which bytes, on which images, where and when."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mecdeploy import __version__, run_folder
from mecdeploy.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mecdeploy.runtime_checks import ParityReport
    from mecdeploy.training.config import TrainConfig
    from mecdeploy.training.data import ImageSource
    from mecdeploy.training.model import QuantizedModel
    from mecdeploy.training.run import LoadedRun

CHECKPOINT_DIGEST = "mecdeploy.checkpoint_sha256"
"""In the metadata of an exported file: of the checkpoint it was made from."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class ValidationImages:
    """All validation images of a run: uint8 [n, C, H, W], and labels int64 [n], or None where there are none."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None


def model_file(folder: run_folder.RunFolder, model: str | Path | None) -> Path:
    """The exported file, by default RUN/model.onnx. Raises UserError where there is none."""
    path = Path(model) if model is not None else folder.path / run_folder.MODEL
    if not path.is_file():
        raise UserError(f"{path}: no such model file; write it with `mecdeploy export {folder.path}`.")
    return path


def validation_images(config: TrainConfig, class_names: tuple[str, ...]) -> ValidationImages:
    """The validation images of a run. class_names: of its checkpoint, for images without labels."""
    from mecdeploy.training.data import load_dataset
    from mecdeploy.training.data.unlabelled import KnownClasses

    classes = KnownClasses(names=class_names, named=True)
    dataset = load_dataset(config.data, seed=config.seed, classes=lambda shape: classes)
    labels = dataset.validation.labels.numpy() if dataset.validation_labelled else None
    return ValidationImages(images=on_disk(dataset.validation), labels=labels)


def certify(
    folder: run_folder.RunFolder, loaded: LoadedRun, path: Path, shown: ValidationImages, progress: Progress | None
) -> ParityReport:
    """Check a run's exported file on its validation images, and write parity.json."""
    report = compare(path, loaded.model, shown.images, shown.labels, progress)
    if not report.passed and metadata_of(path.read_bytes()).get(CHECKPOINT_DIGEST) != loaded.sha256:
        reason = (
            f"{path} was exported from another checkpoint than {loaded.checkpoint.name}; export {folder.path} again."
        )
        report = dataclasses.replace(report, failures=(reason, *report.failures))
    record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **_digests(loaded, path, shown)}
    run_folder.write_json(folder.path / run_folder.PARITY, {**record, **report.to_json()})
    return report


def standing_certificate(
    folder: run_folder.RunFolder, loaded: LoadedRun, path: Path, shown: ValidationImages
) -> dict[str, Any] | None:
    """parity.json, if a check now would look at the same bytes and images with the same runtime on the same processor.

    None where anything differs, or where there is no such file: the check has to be run anew.
    """
    from mecdeploy.runtime_checks.machine import describe_cpu

    found: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        found = json.loads((folder.path / run_folder.PARITY).read_text(encoding="utf-8"))
    expected = {**_digests(loaded, path, shown), "cpu": dataclasses.asdict(describe_cpu()), "versions": versions_here()}
    same = isinstance(found, dict) and all(found.get(key) == value for key, value in expected.items())
    return found if same else None


def compare(
    path: Path,
    network: QuantizedModel,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    progress: Progress | None,
) -> ParityReport:
    """Structure, exactness and accuracy of a file beside the network it came from."""
    from mecdeploy.reference import TorchReference
    from mecdeploy.runtime_checks import check_model

    return check_model(path, images, labels, TorchReference(network), progress=progress, extra_versions=_own_versions())


def metadata_of(content: bytes) -> dict[str, str]:
    """The metadata of an ONNX file."""
    import onnx

    return {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}


def on_disk(source: ImageSource) -> NDArray[np.uint8]:
    """All images of a source, uint8 [n, C, H, W], in a file that goes with the array: they may not fit in memory."""
    import tempfile

    import numpy as np

    stacked: NDArray[np.uint8] | None = None
    done = 0
    for batch in source.batches(64):
        images = batch.images[0].numpy()
        if stacked is None:
            file = tempfile.TemporaryFile()  # noqa: SIM115 (the array keeps its own handle on it)
            stacked = np.memmap(file, np.uint8, "w+", shape=(len(source), *images.shape[1:]))
            file.close()
        stacked[done : done + len(images)] = images
        done += len(images)
    assert stacked is not None and done == len(source)
    return stacked


def _digests(loaded: LoadedRun, path: Path, shown: ValidationImages) -> dict[str, str]:
    """SHA-256 of everything that a check looks at."""
    pixels = hashlib.sha256(repr(shown.images.shape).encode())
    pixels.update(shown.images.reshape(-1).data)
    if shown.labels is not None:
        pixels.update(shown.labels.tobytes())
    return {
        "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "checkpoint_sha256": loaded.sha256,
        "images_sha256": pixels.hexdigest(),
    }


def versions_here() -> dict[str, str]:
    """Of everything that takes part in a check."""
    from mecdeploy.runtime_checks.machine import versions

    return {**versions(), **_own_versions()}


def _own_versions() -> dict[str, str]:
    import torch

    return {"mecdeploy": __version__, "torch": torch.__version__}
