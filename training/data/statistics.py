"""Mean and spread of raw pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mecdeploy.training.errors import TrainingError

_CHUNK = 1 << 24  # pixels counted at a time: bincount makes int64 of them


def pixel_statistics(pixels: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean and standard deviation (population) of all pixels, in pixel units; exact up to the last division and root.

    TrainingError if all pixels are equal, since nothing can be normalised by, or learned from, that.
    """
    flat = pixels.reshape(-1)
    counts = np.zeros(256, np.int64)
    for first in range(0, flat.size, _CHUNK):
        counts += np.bincount(flat[first : first + _CHUNK], minlength=256)
    values = range(256)
    total = sum(int(count) for count in counts)
    first_moment = sum(value * int(count) for value, count in zip(values, counts, strict=True))
    second_moment = sum(value * value * int(count) for value, count in zip(values, counts, strict=True))
    variance_times_square = total * second_moment - first_moment * first_moment
    if variance_times_square == 0:
        raise TrainingError(f"every pixel of the training images is {int(flat[0])}; check the images.")
    return first_moment / total, (variance_times_square**0.5) / total
