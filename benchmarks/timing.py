"""Numbers from times: quartiles, ratios within a round, load times in turn, and which convolutions stayed in float."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx

from mecdeploy.runtime_checks.runtime import open_session

FLOAT_CONVOLUTIONS = ("Conv", "FusedConv")
INTEGER_CONVOLUTIONS = ("QLinearConv", "ConvInteger")


def count_convolutions(path: Path) -> dict[str, int]:
    """Float and integer convolutions in the graph that onnxruntime runs, counted alike for every model."""
    with TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, path.name, threads=1, save_optimized=str(optimized))
        kinds = Counter(node.op_type for node in onnx.load(optimized).graph.node)
    return {
        "float_convolutions": sum(kinds[kind] for kind in FLOAT_CONVOLUTIONS),
        "integer_convolutions": sum(kinds[kind] for kind in INTEGER_CONVOLUTIONS),
    }


def load_times(models: Mapping[str, Path], *, rounds: int) -> dict[str, list[float]]:
    """Milliseconds from a file (in the page cache) to a session ready to run, the models taking turns."""
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            open_session(models[name], name, threads=1, alone=True)
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median, lower and upper quartile, to four digits after the point."""
    lower, median, upper = np.percentile(np.asarray(values), (25, 50, 75))
    return {"median": round(float(median), 4), "q1": round(float(lower), 4), "q3": round(float(upper), 4)}


def ratios(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Quartiles of the ratio within each round: a slow moment slows both, and their ratio stays."""
    return quartiles([value / other for value, other in zip(values, base, strict=True)])
