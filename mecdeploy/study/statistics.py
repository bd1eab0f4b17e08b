"""Means over seeds, and differences to a baseline seed by seed. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Spread:
    """n values: their mean and sample standard deviation (n - 1 in the denominator), None for a single value."""

    n: int
    mean: float
    deviation: float | None


@dataclass(frozen=True, kw_only=True)
class Difference(Spread):
    """Of pairs, value minus baseline. interval: of the mean, by Student's t; None for a single pair."""

    interval: tuple[float, float] | None


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of at least one value, in its unit."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Spread(n=n, mean=mean, deviation=None)
    return Spread(n=n, mean=mean, deviation=math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)))


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], level: float = LEVEL
) -> Difference | None:
    """How much more `values` are than `baseline`, over the seeds that both have; None where they share no seed.

    values, baseline: seed -> value. Pairing takes out what both have from the seed: data order, start, augmentation.
    The interval is mean -+ t * sd / sqrt(n), with t the (1 + level) / 2 quantile of Student's t with n - 1 degrees of
    freedom: it would hold the true difference in `level` of such studies, were the differences normally distributed.
    Source: Student, The probable error of a mean, Biometrika 6 (1908), 1-25.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    found = spread([values[seed] - baseline[seed] for seed in seeds])
    if found.deviation is None:
        return Difference(n=found.n, mean=found.mean, deviation=None, interval=None)
    from scipy.special import stdtrit

    margin = float(stdtrit(found.n - 1, (1 + level) / 2)) * found.deviation / math.sqrt(found.n)
    interval = (found.mean - margin, found.mean + margin)
    return Difference(n=found.n, mean=found.mean, deviation=found.deviation, interval=interval)
