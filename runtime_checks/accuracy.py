"""Accuracy of the trained network and of the served file over all images, and how far their logits are apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mecdeploy.runtime_checks.errors import CheckError
from mecdeploy.runtime_checks.exactness import Reference
from mecdeploy.runtime_checks.model_file import LOGITS, ModelFile
from mecdeploy.runtime_checks.report import Accuracy
from mecdeploy.runtime_checks.runtime import Runtime, batches
from mecdeploy.runtime_checks.tally import differences


def compare_accuracy(
    file: ModelFile,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    reference: Reference,
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """Run both over uint8 images [n, C, H, W] with labels [n], the file as users serve it: nothing exposed.

    Without labels there are no accuracies; all else is the same.
    """
    runtime = Runtime(file)
    correct_torch = correct_onnxruntime = agree = different = 0
    largest = 0.0
    first: int | None = None
    for chosen in batches(len(images), batch_size):
        pixels = images[chosen]
        ours = np.asarray(reference.logits(pixels))
        theirs = runtime.run(pixels)[LOGITS]
        if ours.shape != theirs.shape:
            raise CheckError(
                f"{file.label}: logits are {list(theirs.shape[1:])}, the trained network's {list(ours.shape[1:])}. "
                "Export the run that is checked."
            )
        if ours.ndim != 2:
            raise CheckError(f"{file.label}: logits are {list(ours.shape)}; a classifier's are [images, classes].")
        top_torch, top_onnxruntime = ours.argmax(axis=1), theirs.argmax(axis=1)
        if labels is not None:
            correct_torch += int((top_torch == labels[chosen]).sum())
            correct_onnxruntime += int((top_onnxruntime == labels[chosen]).sum())
        agree += int((top_torch == top_onnxruntime).sum())
        count, gap, where = differences(ours, theirs)
        different += count
        largest = max(largest, gap)
        if count and first is None:
            first = chosen.start + int(where.any(axis=1).argmax())
        if progress is not None:
            progress(chosen.stop, len(images))
    total = len(images)
    return Accuracy(
        images=total,
        accuracy_torch=None if labels is None else correct_torch / total,
        accuracy_onnxruntime=None if labels is None else correct_onnxruntime / total,
        top1_agreement=agree / total,
        max_logit_difference=largest,
        logits_different=different,
        first_different_image=first,
    )
