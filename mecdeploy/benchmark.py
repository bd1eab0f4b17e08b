"""What a model costs to serve: load time, memory, latency and throughput in onnxruntime, beside others' on one machine.

docs/bench.md says how each is measured and what to distrust. torch is imported only where the full-precision network of
a run is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mecdeploy import __version__
from mecdeploy.bench_rivals import gather
from mecdeploy.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mecdeploy.runtime_checks import KernelProfile, LatencyReport, LoadReport, ModelInputs
    from mecdeploy.runtime_checks.machine import Cpu

WIDE = 0.1
"""Spread above which a warning is due: on a quiet machine the middle half of the rounds lies within a few percent."""

PROFILED_RUNS, PROFILED_SECONDS = (5, 50), 2.0
"""Least and most runs under the profiler, and how long they are to take."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Time over that of another model in the same round: median and quartiles over the rounds."""

    median: float
    lower_quartile: float
    upper_quartile: float


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One model with one number of threads and one batch. size: bytes of the file.

    ratio: to the time of the report's baseline; None for the baseline and where there is none.
    """

    model: str
    size: int
    threads: int
    batch: int
    load: LoadReport
    latency: LatencyReport
    ratio: Ratio | None
    profile: KernelProfile | None

    @property
    def images_per_second(self) -> float:
        """Throughput of calls one after the other, at the median."""
        return self.batch / self.latency.median

    def to_json(self) -> dict[str, Any]:
        """Everything measured, and what the table shows of it."""
        return {
            **dataclasses.asdict(self),
            "memory": self.load.memory,
            "spread": self.latency.spread,
            "images_per_second": self.images_per_second,
        }


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """rows: for each number of threads and each batch, the model and then the others, in the order they were given.

    baseline: the other model that ratios are taken to; None where the model was timed alone. cores: that the process
    may use. load_average: processes that wanted a core in the minute before. warnings: sentences.
    """

    rows: tuple[BenchRow, ...]
    baseline: str | None
    seed: int
    cpu: Cpu
    cores: int
    load_average: float | None
    versions: Mapping[str, str]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as plain dicts, lists, numbers and strings. Times are in seconds, sizes in bytes."""
        return {**dataclasses.asdict(self), "rows": [row.to_json() for row in self.rows]}


def bench(
    model: str | Path,
    *,
    against: str | Path | Sequence[str | Path] = (),
    run: str | Path | None = None,
    threads: Sequence[int] = (1,),
    batches: Sequence[int] = (),
    seconds: float = 10.0,
    rounds: int = 20,
    loads: int = 3,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    profile: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> BenchReport:
    """Time an ONNX file in onnxruntime, alone or against others that take turns with it.

    against: ONNX files; run folders, whose full-precision network is meant; "fp32" and "int8": the full-precision
    network of `run` (by default the run in whose folder the model lies), as it is or quantised by onnxruntime's
    quantize_static. batches: by default the one that the model fixes, or 1.
    seconds: of timing, for all threads and batches together; but at least `rounds` rounds of each. loads: processes
    per model that measure load time and memory. shapes: input -> axes after the batch that a file leaves open.
    profile: also run each model under onnxruntime's profiler. say: told what comes next, in a few words.
    Raises UserError, CheckError or TrainingError (of a run that cannot be read).
    """
    from mecdeploy.runtime_checks import compare_latency, machine, measure_loading, random_feed, read_inputs

    _require_positive(threads=threads, batches=batches, rounds=[rounds], loads=[loads])
    busy = machine.load_average()
    path, run = Path(model), None if run is None else Path(run)
    others = [str(other) for other in ([against] if isinstance(against, str | Path) else against)]
    with TemporaryDirectory(prefix="mecdeploy-") as folder:
        files = gather(path, others, run=run, folder=Path(folder), say=say)
        inputs = {name: read_inputs(file) for name, file in files.items()}
        _require_known(shapes or {}, inputs)
        subject, baseline = str(path), next(iter([*files][1:]), None)
        sizes = list(dict.fromkeys(batches)) or [inputs[subject].batch or 1]
        feeds = {
            batch: {name: random_feed(read, batch, shapes=shapes, seed=seed) for name, read in inputs.items()}
            for batch in sizes
        }
        settings = [(count, batch) for count in dict.fromkeys(threads) for batch in sizes]
        rows: list[BenchRow] = []
        for count, batch in settings:
            say(f"Measuring {describe(count, batch)}")
            loading = measure_loading(files, feeds[batch], threads=count, repeats=loads)
            latency = compare_latency(
                files, feeds[batch], threads=count, rounds=rounds, seconds=seconds / len(settings)
            )
            rows += [
                BenchRow(
                    model=name,
                    size=inputs[name].size,
                    threads=count,
                    batch=batch,
                    load=loading[name],
                    latency=latency[name],
                    ratio=None if baseline in (None, name) else _ratio(latency[name], latency[baseline]),
                    profile=_profile(file, feeds[batch][name], count, latency[name].median) if profile else None,
                )
                for name, file in files.items()
            ]
    return BenchReport(
        rows=tuple(rows),
        baseline=baseline,
        seed=seed,
        cpu=machine.describe_cpu(),
        cores=machine.usable_cores(),
        load_average=busy,
        versions={"mecdeploy": __version__, **machine.versions()},
        warnings=(*_mismatches(feeds[sizes[0]]), *_crowded(threads, machine.usable_cores()), *_wide(rows)),
    )


def describe(threads: int, batch: int) -> str:
    """Batch 8, 2 threads."""
    return f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}"


def _profile(file: Path, feed: Mapping[str, NDArray[Any]], threads: int, seconds: float) -> KernelProfile:
    """seconds: what a run takes; a slow model is run less often."""
    from mecdeploy.runtime_checks import profile_kernels

    runs = min(PROFILED_RUNS[1], max(PROFILED_RUNS[0], round(PROFILED_SECONDS / seconds)))
    return profile_kernels(file, feed, threads=threads, runs=runs)


def _ratio(mine: LatencyReport, theirs: LatencyReport) -> Ratio:
    import numpy as np

    lower, median, upper = np.percentile(mine.ratios_to(theirs), (25, 50, 75))
    return Ratio(median=float(median), lower_quartile=float(lower), upper_quartile=float(upper))


def _require_positive(**given: Sequence[int]) -> None:
    for name, values in given.items():
        for value in values:
            if value < 1:
                raise UserError(f"{name} is {value}; it is at least 1.")


def _require_known(shapes: Mapping[str, Sequence[int]], inputs: Mapping[str, ModelInputs]) -> None:
    known = list(dict.fromkeys(one.name for model in inputs.values() for one in model.inputs))
    for name in shapes:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"they are {', '.join(known)}."
            raise UserError(f"a shape is given for {name!r}, which is no input of these models; {hint}")


def _mismatches(feeds: Mapping[str, Mapping[str, NDArray[Any]]]) -> list[str]:
    """Models that read something else than the first: a ratio to those says nothing."""
    shapes = {name: " and ".join(str([*array.shape[1:]]) for array in feed.values()) for name, feed in feeds.items()}
    subject, *others = shapes
    return [
        f"{name} reads {shapes[name]} where {subject} reads {shapes[subject]}: they do different work, and their ratio "
        "says nothing."
        for name in others
        if shapes[name] != shapes[subject]
    ]


def _crowded(threads: Sequence[int], cores: int) -> list[str]:
    return [
        f"{count} threads take turns on {cores} core{'s' if cores > 1 else ''}: give --threads {cores} at most."
        for count in dict.fromkeys(threads)
        if count > cores
    ]


def _wide(rows: Sequence[BenchRow]) -> list[str]:
    """Settings in which the times of some model scatter, with the model whose times do most."""
    warnings = []
    for setting, members in groupby(rows, key=lambda row: (row.threads, row.batch)):
        widest = max(members, key=lambda row: row.latency.spread)
        if widest.latency.spread > WIDE:
            warnings.append(
                f"{describe(*setting)}: the middle half of the rounds of {widest.model} spans "
                f"{widest.latency.spread:.0%} of their median. Other work on the machine is the usual cause: measure "
                "again when it is quiet; ratios suffer less than times."
            )
    return warnings
