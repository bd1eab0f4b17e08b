"""`check_model`: structure, exactness and accuracy of one file, in one report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mecdeploy.runtime_checks.accuracy import compare_accuracy
from mecdeploy.runtime_checks.errors import CheckError
from mecdeploy.runtime_checks.exactness import Reference, compare_exactly
from mecdeploy.runtime_checks.machine import Cpu, describe_cpu, versions
from mecdeploy.runtime_checks.model_file import ModelSource, read_model
from mecdeploy.runtime_checks.report import FloatValueParity, IslandReport, ParityReport
from mecdeploy.runtime_checks.sentences import explain_accuracy, explain_exactness
from mecdeploy.runtime_checks.structure import IslandStructure, inspect_structure

Progress = Callable[[str, int, int], None]

_PIXELS_AT_ONCE = 4 * 224 * 224
"""Of one channel of a batch: float tensors of more fall out of the processor's cache.

PyTorch's side is what gains by it, in time and memory: at 224x224 a batch is 4 images.
"""
_FEWEST, _MOST = 2, 64  # one image a batch would not show that the file takes more
_MOST_EXACT = 16
"""Images compared at once: every unit's integers are held on four sides."""


def check_model(
    model: ModelSource,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    reference: Reference,
    *,
    exact_images: int = 64,
    batch_size: int | None = None,
    progress: Progress | None = None,
    extra_versions: Mapping[str, str] | None = None,
) -> ParityReport:
    """Check one exported file against the network it was exported from.

    images: uint8 [n, C, H, W], labels: int64 [n], or None: then the report has no accuracies. exact_images of them,
    spread over the set, are compared integer for integer; all of them by their logits. batch_size: images at once, by
    default as many as suit their size; at most 16 where integers are compared. progress: called with (stage, done,
    total). extra_versions: of what the reference computes with.
    Raises CheckError for a file that is not ours, damaged beyond reading, or not runnable.
    """
    file = read_model(model)
    images, labels = np.asarray(images), None if labels is None else np.asarray(labels)
    file.feed(images[:1])  # refuses images of another shape before any work
    shape = (len(images),) if labels is None else labels.shape
    if len(images) == 0 or shape != (len(images),):
        raise CheckError(
            f"{len(images)} images and labels {list(shape)}; a check needs at least one image, and a label for each."
        )
    if batch_size is None:
        batch_size = images_at_once(*images.shape[2:])
    if exact_images < 1 or batch_size < 1:
        raise CheckError(f"exact_images is {exact_images}, batch_size {batch_size}; both must be at least 1.")
    report = progress if progress is not None else _silent
    report("structure", 0, 1)
    structure = inspect_structure(file)
    report("structure", 1, 1)
    chosen = np.unique(np.linspace(0, len(images) - 1, min(exact_images, len(images))).round().astype(np.int64))
    exactness = compare_exactly(
        file,
        images[chosen],
        reference,
        batch_size=min(batch_size, _MOST_EXACT),
        progress=partial(report, "exactness"),
    )
    accuracy = compare_accuracy(
        file, images, labels, reference, batch_size=batch_size, progress=partial(report, "accuracy")
    )
    cpu = describe_cpu()
    failures = [
        *explain_exactness(exactness, structure.float_products),
        *structure.failures,
        *explain_accuracy(accuracy, has_islands=bool(file.islands)),
    ]
    if failures:
        failures += _processor_hints(cpu, structure.saturation_risk)
    return ParityReport(
        model=file.label,
        model_bytes=file.size,
        target=file.target,
        images=len(images),
        exact_images=exactness.images,
        integers_compared=exactness.integers_compared,
        integers_different=exactness.integers_different,
        first_different_unit=exactness.first_different_name,
        top1_agreement=accuracy.top1_agreement,
        accuracy_torch=accuracy.accuracy_torch,
        accuracy_onnxruntime=accuracy.accuracy_onnxruntime,
        max_logit_difference=max(accuracy.max_logit_difference, exactness.logits.max_difference),
        logits_compared=exactness.logits.compared,
        logits_different=exactness.logits.different,
        float_convolutions=len(structure.float_products),
        float_convolution_names=structure.float_products,
        integer_convolutions=len(structure.integer_products),
        packed_bits=structure.packed_bits,
        kernels=structure.kernels,
        exact_end_to_end=not file.islands,
        float_islands=len(structure.islands),
        islands=tuple(_island_report(island, exactness.islands) for island in structure.islands),
        float_operators=structure.float_operators,
        weights=structure.weights,
        units=exactness.units,
        logits=exactness.logits,
        optimizer_off=exactness.optimizer_off,
        saturation_risk=structure.saturation_risk,
        cpu=cpu,
        versions={**versions(), **(extra_versions or {})},
        failures=tuple(failures),
    )


def images_at_once(height: int, width: int) -> int:
    """How many images of this size, in pixels, a batch of the check takes."""
    return min(max(_PIXELS_AT_ONCE // (height * width), _FEWEST), _MOST)


def _island_report(island: IslandStructure, compared: Sequence[FloatValueParity]) -> IslandReport:
    values = tuple(row for row in compared if row.island == island.name)
    return IslandReport(
        name=island.name,
        operators=island.operators,
        reason=island.reason,
        kernels=island.kernels,
        compared=sum(row.compared for row in values),
        different=sum(row.different for row in values),
        max_difference=max((row.max_difference for row in values), default=0.0),
        values=values,
    )


def _processor_hints(cpu: Cpu, saturation_risk: tuple[str, ...]) -> list[str]:
    """What the processor may have to do with a failure."""
    if not cpu.note:
        return []
    if cpu.vnni is False:
        return [f"{cpu.note} Units at risk: {', '.join(saturation_risk) or 'none'}."]
    return [cpu.note]


def _silent(stage: str, done: int, total: int) -> None:
    """Progress for nobody."""
