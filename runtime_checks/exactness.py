"""Unit by unit: PyTorch's integers == onnxruntime's == the numpy interpreter's, and the logits bit for bit.

Float islands round as they like. What onnxruntime quantises from their outputs is handed to the other two, which go on
from there: so every integer kernel is compared exactly, whatever islands lie before it, and the islands apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mecdeploy.runtime_checks.errors import CheckError
from mecdeploy.runtime_checks.interpreter import Interpreter
from mecdeploy.runtime_checks.model_file import LOGITS, PIXELS, ModelFile
from mecdeploy.runtime_checks.patterns import Graph
from mecdeploy.runtime_checks.report import Exactness, OptimizerOff
from mecdeploy.runtime_checks.runtime import Runtime, batches
from mecdeploy.runtime_checks.tally import (
    INTERPRETER,
    ONNXRUNTIME,
    TORCH,
    FloatValueTally,
    OffTally,
    Tally,
    differences,
)

Array = NDArray[Any]
Results = Mapping[str, Array]

ISLAND_LOGIT_TOLERANCE = 1e-4
"""Of the largest logit: what logits that a float island makes may differ by.

Both sides start from the same integers there, so only that island's rounding differs: each float32 operation by 6e-8 of
its result, some hundreds of them in a row by less than 1e-5. A GELU of another formula differs by more than 1e-4.
"""


class Reference(Protocol):
    """The trained network, evaluated outside this room."""

    def integers(self, pixels: NDArray[np.uint8], given: Results = MappingProxyType({})) -> Results:
        """Every unit output's stored uint8 codes, Gemms' float32 outputs, and float32 "logits".

        pixels: raw, [n, C, H, W]. given: uint8 codes of values that are quantised from float islands: later units read
        these; what the network itself computes for them is returned under their names.
        """

    def logits(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[n, classes], everything computed by the network itself."""


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
    graph = Graph(file.proto.graph, file.islands)
    interpreter = Interpreter(file)
    tensors = graph.tensors()
    units = [name for name in file.units if name not in file.float_values]
    names = units if file.input_name == PIXELS else [PIXELS, *units]
    exposed = [name for name in (*names, *file.float_values) if name in tensors]
    default, plain = Runtime(file, exposed=exposed), Runtime(file)
    unoptimized = Runtime(file, exposed=exposed, optimize=False)
    tallies = {name: Tally(name) for name in names}
    logits = Tally(LOGITS, relative_tolerance=0.0 if interpreter.computes_logits else ISLAND_LOGIT_TOLERANCE)
    islands = {name: FloatValueTally(name, _island_before(graph, name)) for name in file.float_values}
    off_integers, off_logits = OffTally(), OffTally()
    exposed_logits_different = 0
    for chosen in batches(len(images), batch_size):
        pixels = images[chosen]
        ran = default.run(pixels)
        given = {name: ran[name] for name in file.float_values}
        # a reference that knows no islands needs no second argument for files without
        computed = reference.integers(pixels, given) if given else reference.integers(pixels)
        expected = {PIXELS: pixels, **computed}
        for name in expected:
            if name not in (*tallies, *islands, PIXELS, LOGITS):
                tallies[name] = Tally(name)
        interpreted = interpreter.run(pixels, outputs={*tallies, LOGITS}, given=given)
        for name, tally in tallies.items():
            tally.add({TORCH: expected.get(name), ONNXRUNTIME: ran.get(name), INTERPRETER: interpreted.get(name)})
        for name, island in islands.items():
            island.add(expected.get(name), ran[name])
        sides = {TORCH: expected.get(LOGITS), ONNXRUNTIME: ran[LOGITS]}
        logits.add({**sides, INTERPRETER: interpreted[LOGITS]} if interpreter.computes_logits else sides)
        off = unoptimized.run(pixels)
        for name in exposed:
            if ran[name].dtype == np.uint8:
                off_integers.add(ran[name], off[name])
        off_logits.add(ran[LOGITS], off[LOGITS])
        exposed_logits_different += differences(ran[LOGITS], plain.run(pixels)[LOGITS])[0]
        if progress is not None:
            progress(chosen.stop, len(images))
    return Exactness(
        images=len(images),
        units=tuple(tally.parity() for tally in tallies.values()),
        logits=logits.parity(),
        islands=tuple(tally.parity() for tally in islands.values()),
        optimizer_off=OptimizerOff(
            integers_compared=off_integers.compared,
            integers_different=off_integers.different,
            max_difference=off_integers.largest,
            max_logit_difference=off_logits.largest,
        ),
        exposed_logits_different=exposed_logits_different,
        has_islands=bool(file.islands),
    )


def _island_before(graph: Graph, name: str) -> str:
    """The island whose output a value is quantised from: QuantizeLinear (-> Clip) reads it."""
    node = graph.producers[name]
    if node.op_type == "Clip":
        node = graph.producers[node.input[0]]
    island = graph.island(graph.producers[node.input[0]])
    if island is None:
        raise CheckError(f"{name}: no float island computes it. Export the run again.")
    return island
