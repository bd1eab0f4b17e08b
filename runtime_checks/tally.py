"""Counting differences: of one tensor on three sides, of a float value on two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecdeploy.runtime_checks.report import FloatValueParity, TensorParity

Array = NDArray[Any]

TORCH, ONNXRUNTIME, INTERPRETER = "PyTorch", "onnxruntime", "the interpreter"
SIDES = (TORCH, ONNXRUNTIME, INTERPRETER)
_PAIRS = ((TORCH, ONNXRUNTIME), (TORCH, INTERPRETER), (ONNXRUNTIME, INTERPRETER))


def differences(a: Array, b: Array) -> tuple[int, float, NDArray[np.bool_]]:
    """How many values differ, by how much at most, and where. Equality is exact; NaN differs from everything."""
    where = a != b
    count = int(np.count_nonzero(where))
    if count == 0:
        return 0, 0.0, where
    gaps = np.abs(a[where].astype(np.float64) - b[where].astype(np.float64))
    return count, float("inf") if np.isnan(gaps).any() else float(gaps.max()), where


class Tally:
    """Differences of one tensor, summed over batches.

    relative_tolerance: of the largest magnitude seen, what values may differ by; 0 demands the same bits.
    """

    def __init__(self, name: str, *, relative_tolerance: float = 0.0) -> None:
        self.name = name
        self.compared = self.different = 0
        self.pairs = dict.fromkeys(_PAIRS, 0)
        self.largest = 0.0
        self.missing: set[str] = set()
        self._real = False
        self._relative_tolerance = relative_tolerance
        self._magnitude = 0.0

    def add(self, sides: Mapping[str, Array | None]) -> None:
        """One batch: the tensor on every side, None where it is missing."""
        present = {side: np.asarray(values) for side, values in sides.items() if values is not None}
        shapes = [values.shape for values in present.values()]
        common = max(set(shapes), key=shapes.count) if shapes else ()
        usable = {side: values for side, values in present.items() if values.shape == common}
        self.missing.update(side for side in sides if side not in usable)
        self.compared += int(np.prod(common)) if shapes else 0
        self._real |= any(values.dtype != np.uint8 for values in usable.values())
        if self._relative_tolerance and ONNXRUNTIME in usable:
            self._magnitude = max(self._magnitude, float(np.abs(usable[ONNXRUNTIME]).max(initial=0.0)))
        disagree = np.zeros(common, bool)
        for pair in _PAIRS:
            if pair[0] in usable and pair[1] in usable:
                count, largest, where = differences(usable[pair[0]], usable[pair[1]])
                self.pairs[pair] += count
                self.largest = max(self.largest, largest)
                disagree |= where
        self.different += int(disagree.sum())

    def parity(self) -> TensorParity:
        """The sums so far."""
        counts = [self.pairs[pair] for pair in _PAIRS]
        return TensorParity(
            name=self.name,
            compared=self.compared,
            different=self.different,
            torch_vs_onnxruntime=counts[0],
            torch_vs_interpreter=counts[1],
            onnxruntime_vs_interpreter=counts[2],
            max_difference=self.largest,
            missing=tuple(side for side in SIDES if side in self.missing),
            real=self._real,
            tolerance=self._relative_tolerance * self._magnitude if np.isfinite(self._magnitude) else 0.0,
        )


class FloatValueTally:
    """Differences of the integers that PyTorch and onnxruntime quantise from one output of a float island."""

    def __init__(self, name: str, island: str) -> None:
        self._name, self._island = name, island
        self._compared = self._different = 0
        self._largest = 0.0
        self._missing = False

    def add(self, torch: Array | None, onnxruntime: Array) -> None:
        """One batch; torch is None where the reference has no such tensor."""
        if torch is None or np.asarray(torch).shape != onnxruntime.shape:
            self._missing = True
            return
        count, largest, _ = differences(np.asarray(torch), onnxruntime)
        self._compared += onnxruntime.size
        self._different += count
        self._largest = max(self._largest, largest)

    def parity(self) -> FloatValueParity:
        """The sums so far."""
        return FloatValueParity(
            name=self._name,
            island=self._island,
            compared=self._compared,
            different=self._different,
            max_difference=self._largest,
            missing=self._missing,
        )


class OffTally:
    """Differences between onnxruntime's two optimisation levels."""

    def __init__(self) -> None:
        self.compared = self.different = 0
        self.largest = 0.0

    def add(self, a: Array, b: Array) -> None:
        """One tensor of one batch."""
        count, largest, _ = differences(a, b)
        self.compared += a.size
        self.different += count
        self.largest = max(self.largest, largest)
