"""Latency of several models in one process, interleaved, so that whatever slows the machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecdeploy.runtime_checks.errors import CheckError
from mecdeploy.runtime_checks.runtime import open_session


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """Seconds per run of one model. rounds: one time per round, in order, comparable across models by position."""

    median: float
    lower_quartile: float
    upper_quartile: float
    fastest: float
    rounds: tuple[float, ...]

    def ratio_to(self, other: LatencyReport) -> float:
        """Median over rounds of this model's time over the other's in the same round: drift cancels."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.rounds, other.rounds, strict=True))


def compare_latency(
    models: Mapping[str, bytes | Path],
    feeds: Mapping[str, Mapping[str, NDArray[Any]]],
    *,
    threads: int = 1,
    rounds: int = 50,
    warmup: int = 3,
) -> dict[str, LatencyReport]:
    """Time every model once per round, the order turning by one each round.

    models: name -> ONNX bytes or path. feeds: name -> input name -> array. warmup: untimed rounds at the start.
    """
    if rounds < 1 or set(models) != set(feeds) or not models:
        raise CheckError(
            f"latency of {sorted(models)} with feeds for {sorted(feeds)} over {rounds} rounds; "
            "give at least one model, one feed for each and one round."
        )
    sessions = {name: open_session(model, name, threads=threads, alone=True) for name, model in models.items()}
    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            feed = dict(feeds[name])
            start = time.perf_counter()
            sessions[name].run(None, feed)
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: _summarize(times) for name, times in seconds.items()}


def _summarize(seconds: list[float]) -> LatencyReport:
    lower, median, upper = np.percentile(seconds, (25, 50, 75))
    return LatencyReport(
        median=float(median),
        lower_quartile=float(lower),
        upper_quartile=float(upper),
        fastest=min(seconds),
        rounds=tuple(seconds),
    )
