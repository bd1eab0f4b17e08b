"""Unit by unit: PyTorch's integers == onnxruntime's == the numpy interpreter's, and the logits bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mecdeploy.runtime_checks.interpreter import Interpreter
from mecdeploy.runtime_checks.model_file import LOGITS, PIXELS, ModelFile
from mecdeploy.runtime_checks.patterns import Graph
from mecdeploy.runtime_checks.report import Exactness, OptimizerOff, TensorParity
from mecdeploy.runtime_checks.runtime import Runtime, batches

Array = NDArray[Any]
Results = Mapping[str, Array]

TORCH, ONNXRUNTIME, INTERPRETER = "PyTorch", "onnxruntime", "the interpreter"
SIDES = (TORCH, ONNXRUNTIME, INTERPRETER)
_PAIRS = ((TORCH, ONNXRUNTIME), (TORCH, INTERPRETER), (ONNXRUNTIME, INTERPRETER))


class Reference(Protocol):
    """The trained network, evaluated outside this room."""

    def integers(self, pixels: NDArray[np.uint8]) -> Results:
        """Every unit output's stored uint8 codes, and float32 "logits", for raw pixels [n, C, H, W]."""

    def logits(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[n, classes]."""


class Tally:
    """Differences of one tensor, summed over batches."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.compared = self.different = 0
        self.pairs = dict.fromkeys(_PAIRS, 0)
        self.largest = 0.0
        self.missing: set[str] = set()

    def add(self, sides: Mapping[str, Array | None]) -> None:
        """One batch: the tensor on every side, None where it is missing."""
        present = {side: np.asarray(values) for side, values in sides.items() if values is not None}
        shapes = [values.shape for values in present.values()]
        common = max(set(shapes), key=shapes.count) if shapes else ()
        usable = {side: values for side, values in present.items() if values.shape == common}
        self.missing.update(side for side in sides if side not in usable)
        self.compared += int(np.prod(common)) if shapes else 0
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
        )


def differences(a: Array, b: Array) -> tuple[int, float, NDArray[np.bool_]]:
    """How many values differ, by how much at most, and where. Equality is exact; NaN differs from everything."""
    where = a != b
    count = int(np.count_nonzero(where))
    if count == 0:
        return 0, 0.0, where
    gaps = np.abs(a[where].astype(np.float64) - b[where].astype(np.float64))
    return count, float("inf") if np.isnan(gaps).any() else float(gaps.max()), where


def compare_exactly(
    file: ModelFile,
    images: NDArray[np.uint8],
    reference: Reference,
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Exactness:
    """Run all sides over uint8 images [n, C, H, W] and count every difference.

    The units are those the metadata lists and those the reference knows: one that a side lacks is a failure. With a
    float input the pixels that the graph recovers from it are compared too.
    """
    tensors = Graph(file.proto.graph).tensors()
    names = list(file.units) if file.input_name == PIXELS else [PIXELS, *file.units]
    exposed = [name for name in names if name in tensors]
    default, plain = Runtime(file, exposed=exposed), Runtime(file)
    unoptimized = Runtime(file, exposed=exposed, optimize=False)
    interpreter = Interpreter(file)
    tallies = {name: Tally(name) for name in (*names, LOGITS)}
    off_integers, off_logits = _Off(), _Off()
    exposed_logits_different = 0
    for chosen in batches(len(images), batch_size):
        pixels = images[chosen]
        expected = {PIXELS: pixels, **reference.integers(pixels)}
        for name in expected:
            if name not in tallies and name != PIXELS:
                tallies[name] = Tally(name)
        ran = default.run(pixels)
        interpreted = interpreter.run(pixels, outputs=set(tallies))
        for name, tally in tallies.items():
            tally.add({TORCH: expected.get(name), ONNXRUNTIME: ran.get(name), INTERPRETER: interpreted.get(name)})
        off = unoptimized.run(pixels)
        for name in exposed:
            off_integers.add(ran[name], off[name])
        off_logits.add(ran[LOGITS], off[LOGITS])
        exposed_logits_different += differences(ran[LOGITS], plain.run(pixels)[LOGITS])[0]
        if progress is not None:
            progress(chosen.stop, len(images))
    logits = tallies.pop(LOGITS).parity()
    return Exactness(
        images=len(images),
        units=tuple(tally.parity() for tally in tallies.values()),
        logits=logits,
        optimizer_off=OptimizerOff(
            integers_compared=off_integers.compared,
            integers_different=off_integers.different,
            max_difference=off_integers.largest,
            max_logit_difference=off_logits.largest,
        ),
        exposed_logits_different=exposed_logits_different,
    )


class _Off:
    """Differences between the two optimisation levels."""

    def __init__(self) -> None:
        self.compared = self.different = 0
        self.largest = 0.0

    def add(self, a: Array, b: Array) -> None:
        count, largest, _ = differences(a, b)
        self.compared += a.size
        self.different += count
        self.largest = max(self.largest, largest)


def explain(exactness: Exactness, float_products: tuple[str, ...] = ()) -> list[str]:
    """Sentences for what differs; the first one names the first unit and what its pairs say. Empty when all agree."""
    failures = []
    first = exactness.first_different
    if first is not None:
        failures.append(_explain_tensor(first, float_products))
        others = [row.name for row in (*exactness.units, exactness.logits) if not row.agrees and row is not first]
        if others:
            failures.append(f"{len(others)} tensors after {first.name} differ too: {_list(others)}.")
    if exactness.exposed_logits_different:
        failures.append(
            f"{exactness.exposed_logits_different} logits change when the units are made graph outputs, so this "
            "onnxruntime fuses differently with and without them. Report it with the versions of this check."
        )
    return failures


def _explain_tensor(row: TensorParity, float_products: tuple[str, ...]) -> str:
    kind = "logits" if row.name == LOGITS else "integers"
    if row.missing:
        return (
            f"{row.name} is the first unit that differs: {_list(row.missing)} has no such tensor, or in another shape. "
            "Export the run again, from the checkpoint that is checked."
        )
    found = (
        f"{row.name} is the first unit that differs: {row.different} of {row.compared} {kind}, "
        f"by at most {row.max_difference:g}{' steps' if kind == 'integers' else ''}. "
    )
    if row.onnxruntime_vs_interpreter == 0:
        return found + (
            "onnxruntime and the interpreter agree, so the file holds another weight, scale or bias than the trained "
            "network: export the run again."
        )
    if row.torch_vs_interpreter == 0:
        reason = "runs it in float" if row.name in float_products else "differs on this processor or in this version"
        return found + f"PyTorch and the interpreter agree, so onnxruntime {reason}."
    if row.torch_vs_onnxruntime == 0:
        return found + "PyTorch and onnxruntime agree, so the interpreter does not know this arithmetic: report it."
    return found + "No two sides agree: the file was changed in a way that also stops onnxruntime's integer kernel."


def _list(names: tuple[str, ...] | list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
