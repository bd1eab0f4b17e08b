"""Latency of several models in one process, interleaved, so that whatever slows the machine slows all of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from mecdeploy.runtime_checks.errors import CheckError
from mecdeploy.runtime_checks.runtime import brief, open_session

MOST_ROUNDS = 1000
"""Of a model that takes microseconds: more would hardly move the median, and fill the report with numbers."""


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """Seconds per run of one model. rounds: one time per round, in order, comparable across models by position."""

    median: float
    lower_quartile: float
    upper_quartile: float
    fastest: float
    rounds: tuple[float, ...]

    @property
    def spread(self) -> float:
        """How far the middle half of the rounds reaches, as a share of the median."""
        return (self.upper_quartile - self.lower_quartile) / self.median

    def ratios_to(self, other: LatencyReport) -> list[float]:
        """This model's time over the other's in the same round, round by round: drift cancels."""
        return [mine / theirs for mine, theirs in zip(self.rounds, other.rounds, strict=True)]

    def ratio_to(self, other: LatencyReport) -> float:
        """Median of these ratios."""
        return statistics.median(self.ratios_to(other))


def compare_latency(
    models: Mapping[str, bytes | Path],
    feeds: Mapping[str, Mapping[str, NDArray[Any]]],
    *,
    threads: int = 1,
    rounds: int = 50,
    warmup: int = 3,
    seconds: float = 0.0,
    most: int = MOST_ROUNDS,
) -> dict[str, LatencyReport]:
    """Time every model once per round, the order turning by one each round.

    models: name -> ONNX bytes or path. feeds: name -> input name -> array. warmup: untimed rounds at the start.
    seconds: rounds go on beyond `rounds` until so many have passed, warm-up included, or there are `most` of them.
    Raises CheckError for a model that onnxruntime refuses, or that does not take its feed.
    """
    if rounds < 1 or set(models) != set(feeds) or not models:
        raise CheckError(
            f"latency of {sorted(models)} with feeds for {sorted(feeds)} over {rounds} rounds; "
            "give at least one model, one feed for each and one round."
        )
    sessions = {name: open_session(model, name, threads=threads, alone=True) for name, model in models.items()}
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    began = perf_counter()
    turn = 0
    while turn < warmup + rounds or (turn < warmup + most and perf_counter() - began < seconds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            elapsed = _time_once(sessions[name], dict(feeds[name]), name)
            if turn >= warmup:
                times[name].append(elapsed)
        turn += 1
    return {name: _summarize(found) for name, found in times.items()}


def _time_once(session: onnxruntime.InferenceSession, feed: dict[str, NDArray[Any]], name: str) -> float:
    start = perf_counter()
    try:
        session.run(None, feed)
    except Exception as error:  # onnxruntime's errors share no narrower base class
        shapes = ", ".join(f"{key} {list(array.shape)}" for key, array in feed.items())
        raise CheckError(f"{name}: onnxruntime cannot run it on {shapes} ({brief(error)}).") from None
    return perf_counter() - start


def _summarize(seconds: list[float]) -> LatencyReport:
    lower, median, upper = np.percentile(seconds, (25, 50, 75))
    return LatencyReport(
        median=float(median),
        lower_quartile=float(lower),
        upper_quartile=float(upper),
        fastest=min(seconds),
        rounds=tuple(seconds),
    )
