"""How onnxruntime uses the codes of a file: every quantised tensor's histogram, and its shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mecdeploy.run_report.layers import FileLayer
from mecdeploy.runtime_checks import ModelFile
from mecdeploy.runtime_checks.checks import images_at_once
from mecdeploy.runtime_checks.runtime import Runtime, batches

MOST_COUNTED = 256
"""Images, spread over the set: of 8x8 pixels already some thousand codes a tensor, of 224x224 hundreds of millions."""
_CODES = 256


@dataclass(frozen=True, kw_only=True)
class Counted:
    """images: how many were run. counts: tensor -> how many values have each code 0..255. shapes: of one image."""

    images: int
    counts: dict[str, NDArray[np.int64]]
    shapes: dict[str, tuple[int, ...]]


def count_codes(
    file: ModelFile, layers: Sequence[FileLayer], images: NDArray[np.uint8], progress: Callable[[int, int], None]
) -> Counted:
    """Run uint8 images [n, C, H, W], or where there are more MOST_COUNTED of them, with every unit exposed."""
    values = [value for layer in layers for value in layer.values]
    runtime = Runtime(file, exposed=[value.tensor for value in values])
    chosen = np.unique(np.linspace(0, len(images) - 1, min(MOST_COUNTED, len(images))).round().astype(np.int64))
    counts = {value.tensor: np.zeros(_CODES, np.int64) for value in values if value.made}
    shapes: dict[str, tuple[int, ...]] = {}
    for part in batches(len(chosen), images_at_once(*images.shape[2:])):
        ran = runtime.run(images[chosen[part]])
        for value in values:
            found = ran[value.tensor]
            shapes[value.tensor] = tuple(found.shape[1:])
            if value.made:
                counts[value.tensor] += np.bincount(found.reshape(-1), minlength=_CODES)
        progress(part.stop, len(chosen))
    return Counted(images=len(chosen), counts=counts, shapes=shapes)
