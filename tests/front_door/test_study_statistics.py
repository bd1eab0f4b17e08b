"""Means, deviations and intervals against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from mecdeploy.study.report import rows
from mecdeploy.study.statistics import paired_difference, spread

EXACT = pytest.approx  # its default, a relative 1e-6, is far above the rounding of ten float64 operations


def test_mean_and_deviation() -> None:
    found = spread([2.0, 4.0, 4.0, 6.0])  # squares of 2, 0, 0, 2 over 3
    assert (found.n, found.mean) == (4, 4.0)
    assert found.deviation == EXACT(math.sqrt(8 / 3))
    assert spread([91.5]).deviation is None


def test_two_seeds_against_the_closed_form() -> None:
    """Student's t with one degree of freedom is Cauchy's distribution: its quantile is tan(pi (p - 1/2))."""
    found = paired_difference({0: 71.0, 1: 74.0}, {0: 70.0, 1: 71.0})  # differences 1 and 3
    assert found is not None and found.interval is not None
    assert (found.n, found.mean, found.deviation) == (2, 2.0, EXACT(math.sqrt(2)))
    margin = math.tan(math.pi * 0.475) * math.sqrt(2) / math.sqrt(2)
    assert found.interval == EXACT((2 - margin, 2 + margin))


def test_three_seeds_against_the_closed_form() -> None:
    """With two degrees of freedom the quantile is (2p - 1) / sqrt(2 p (1 - p)): 4.3027 for 95 %."""
    found = paired_difference({3: 11.0, 5: 22.0, 4: 33.0}, {4: 30.0, 3: 10.0, 5: 20.0})  # 1, 2, 3
    assert found is not None and found.interval is not None
    quantile = 0.95 / math.sqrt(2 * 0.975 * 0.025)
    assert quantile == EXACT(4.3026527)
    assert (found.mean, found.deviation) == (2.0, EXACT(1.0))
    assert found.interval == EXACT((2 - quantile / math.sqrt(3), 2 + quantile / math.sqrt(3)))


def test_pairs_are_of_common_seeds_alone() -> None:
    found = paired_difference({0: 5.0, 1: 9.0}, {1: 8.0, 2: 1.0})
    assert found is not None
    assert (found.n, found.mean, found.deviation, found.interval) == (1, 1.0, None, None), "one pair: no interval"
    assert paired_difference({0: 5.0}, {1: 5.0}) is None


def test_equal_differences_have_an_interval_of_no_width() -> None:
    found = paired_difference({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})
    assert found is not None and found.interval == (1.0, 1.0)


def record(method: str, bits: str, seed: int, accuracy: float, regime: str = "") -> dict[str, object]:
    return {"regime": regime, "method": method, "bits": bits, "seed": seed, "accuracy": accuracy}


def test_rows_pair_each_width_with_the_baseline_at_that_width() -> None:
    records = [
        record("lsq", "W2A2", 0, 0.50),
        record("lsq", "W4A4", 0, 0.75),
        record("mec", "W2A2", 0, 0.625),
        record("mec", "W4A4", 0, 0.75),
        record("fp32", "", 0, 0.875),
        record("mec", "W2A2", 0, 0.5, "few"),
    ]
    tests = [record("lsq", "W2A2", 0, 0.25), record("mec", "W2A2", 0, 0.5)]
    found = {(row.regime, row.method, row.bits): row for row in rows(records, tests, "lsq")}
    assert list(found)[0] == ("", "fp32", ""), "what has no bits comes first"
    differences = {key: None if row.difference is None else row.difference.mean for key, row in found.items()}
    assert differences == {
        ("", "fp32", ""): None,
        ("", "lsq", "W2A2"): None,
        ("", "lsq", "W4A4"): None,
        ("", "mec", "W2A2"): 12.5,
        ("", "mec", "W4A4"): 0.0,
        ("few", "mec", "W2A2"): None,
    }
    row = found["", "mec", "W2A2"]
    assert row.validation.mean == 62.5 and row.test is not None and row.test.mean == 50.0
    assert row.test_difference is not None and row.test_difference.mean == 25.0
    assert found["", "mec", "W4A4"].test is None


def test_a_baseline_without_bits_is_the_partner_of_every_width() -> None:
    records = [record("fp32", "", 0, 0.875), record("lsq", "W2A2", 0, 0.5), record("lsq", "W4A4", 0, 0.75)]
    differences = [row.difference.mean if row.difference else None for row in rows(records, [], "fp32")]
    assert differences == [None, -37.5, -12.5]
