"""Widths for a size against every combination there is, and sizes counted by hand."""

from __future__ import annotations

import itertools
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest

from mecdeploy.training import bit_allocation
from mecdeploy.training.bit_allocation import (
    allocate,
    monotone_costs,
    packed_bytes,
    packed_size,
    parse_size,
    with_weight_bits,
)
from mecdeploy.training.config import QuantConfig, ScheduleConfig, TrainConfig
from mecdeploy.training.errors import TrainingError

WIDTHS = (2, 3, 4, 8)
TABLE = 163_840  # 32768 rows of 5 int8
Costs = dict[str, dict[int, float]]


def by_hand(counts: dict[str, int], bits: dict[str, int]) -> int:
    """Whole words of 4, 5, 2 and 1 weights in 1, 2, 1 and 1 bytes."""
    size = TABLE if 3 in bits.values() else 0
    for name, count in counts.items():
        words, rest = divmod(count, {2: 4, 3: 5, 4: 2, 8: 1}[bits[name]])
        size += (words + (rest > 0)) * (2 if bits[name] == 3 else 1)
    return size


def least_cost(counts: dict[str, int], costs: Costs, budget: int) -> float | None:
    """The cheapest of all combinations that fit; None if none does."""
    found = []
    for choice in itertools.product(WIDTHS, repeat=len(counts)):
        bits = dict(zip(counts, choice, strict=True))
        if by_hand(counts, bits) <= budget:
            found.append(sum(costs[name][bits[name]] for name in counts))
    return min(found, default=None)


def random_case(seed: int) -> tuple[dict[str, int], Costs, int]:
    """Five layers, from small ones to ones where the 3-bit table is little, and any budget from too small to ample."""
    rng = np.random.default_rng(seed)
    largest = 10 ** rng.integers(2, 8)
    counts = {f"layer{i}": int(rng.integers(1, largest)) for i in range(5)}
    increases = rng.exponential(1.0, (5, 3)) * rng.choice([0.0, 1e-6, 0.1, 3.0], (5, 3))
    costs = {
        name: monotone_costs({2: row[0], 3: row[1], 4: row[2], 8: 0.0})
        for name, row in zip(counts, increases, strict=True)
    }
    return counts, costs, int(rng.uniform(0.2, 1.1) * sum(counts.values()))


@pytest.mark.parametrize("seed", range(60))
def test_no_combination_that_fits_is_cheaper(seed: int) -> None:
    counts, costs, budget = random_case(seed)
    least = least_cost(counts, costs, budget)
    if least is None:
        with pytest.raises(TrainingError, match="give at least that"):
            allocate(counts, costs, budget)
        return
    bits = allocate(counts, costs, budget)
    assert list(bits) == list(counts)
    assert by_hand(counts, bits) <= budget
    assert sum(costs[name][bits[name]] for name in counts) == pytest.approx(least, rel=1e-12)  # sums in another order


def test_the_random_cases_are_not_all_alike() -> None:
    """Some fit nothing, some need 3 bits, some have no use for them."""
    chosen = []
    for seed in range(60):
        counts, costs, budget = random_case(seed)
        if least_cost(counts, costs, budget) is not None:
            chosen.append(set(allocate(counts, costs, budget).values()))
    assert 0 < len(chosen) < 60
    assert any(3 in bits for bits in chosen) and any(3 not in bits for bits in chosen)
    assert any(len(bits) > 2 for bits in chosen)


@pytest.mark.parametrize("seed", range(20))
def test_a_search_that_forgets_states_fits_and_loses_what_it_says(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most the optimum of a budget smaller by budget / FRONT_LIMIT bytes for each layer."""
    monkeypatch.setattr(bit_allocation, "FRONT_LIMIT", 16)
    rng = np.random.default_rng(seed)
    counts = {f"layer{i}": int(rng.integers(1000, 100_000)) for i in range(6)}
    costs = {name: monotone_costs(dict(zip(WIDTHS, [*rng.exponential(1.0, 3), 0.0], strict=True))) for name in counts}
    budget = sum(counts.values()) * 3 // 4
    bits = allocate(counts, costs, budget)
    assert by_hand(counts, bits) <= budget
    worse = least_cost(counts, costs, budget - 6 * (budget // 16 + 1))
    assert worse is not None and sum(costs[name][bits[name]] for name in counts) <= worse + 1e-12  # sums reordered


def test_a_layer_gets_only_a_width_that_is_open_to_it() -> None:
    counts = {"norm": 60, "conv": 1000}
    costs: Costs = {"norm": {8: 0.0}, "conv": {2: 0.5, 4: 0.1, 8: 0.0}}
    assert allocate(counts, costs, 600) == {"norm": 8, "conv": 4}
    assert allocate(counts, costs, 310) == {"norm": 8, "conv": 2}
    assert allocate(counts, costs, 5000) == {"norm": 8, "conv": 8}
    with pytest.raises(TrainingError, match="take 310; give at least that"):
        allocate(counts, costs, 309)


def test_bytes_that_nothing_asks_for_widen_layers_but_buy_no_table() -> None:
    counts = {"small": 10, "large": 400_000}
    free: Costs = {name: dict.fromkeys(WIDTHS, 0.0) for name in counts}
    assert allocate(counts, free, 400_010) == {"small": 8, "large": 8}
    assert allocate(counts, free, 200_010) == {"small": 8, "large": 4}
    assert allocate(counts, free, 399_999) == {"small": 8, "large": 4}  # 3 bits and their table would fit, too
    assert allocate(counts, free, 100_003) == {"small": 2, "large": 2}


def test_the_error_names_the_least_size() -> None:
    counts = {"a": 10, "b": 1000}
    free: Costs = {name: dict.fromkeys(WIDTHS, 0.0) for name in counts}
    with pytest.raises(TrainingError, match=r"size is 252 bytes, but all weights at 2 bits take 253; give at least"):
        allocate(counts, free, 252)
    assert allocate(counts, free, 253) == {"a": 2, "b": 2}


@pytest.mark.parametrize(("bits", "size"), [(2, 3), (3, 6), (4, 6), (8, 11)])
def test_eleven_weights(bits: int, size: int) -> None:
    assert packed_bytes(11, bits) == size
    assert packed_size({"a": 11, "b": 11}, {"a": bits, "b": bits}) == 2 * size + (TABLE if bits == 3 else 0)


def test_costs_never_rise_with_the_width() -> None:
    assert monotone_costs({2: 0.5, 3: 0.7, 4: -0.1, 8: 0.0}) == {8: 0.0, 4: 0.0, 3: 0.7, 2: 0.7}
    assert monotone_costs({2: -0.2, 4: 0.1, 8: 0.0}) == {8: 0.0, 4: 0.1, 2: 0.1}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40000", 40_000),
        ("40000B", 40_000),
        ("1.2MB", 1_200_000),
        ("1.2 mb", 1_200_000),
        ("300KiB", 307_200),
        ("2GB", 2_000_000_000),
        ("70%", 7_001),
        ("12.5%", 1_250),
        (" .5KB ", 500),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, 10_002) == size


@pytest.mark.parametrize("text", ["", "x", "1TB", "-5", "5%%", "1e6", "0", "0.3", "1.2.3MB", "MB", "nan", "70 % MB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(TrainingError, match="give bytes"):
        parse_size(text, 10_002)


def test_settings_hold_the_new_weight_bits_and_all_else() -> None:
    overrides = {"*": {"weight_bits": 2, "act_bits": 3}, "fc": {"act_bits": 8}, "layer*": {"weight_bits": 8}}
    config = TrainConfig(
        method="lsq",
        seed=7,
        quant=QuantConfig(weight_bits=3, act_bits=2, overrides=overrides),
        schedule=ScheduleConfig(fp_epochs=9, epochs=5, frozen_epochs=1),
    )
    names = ["layer1.0", "heads[0].*?", "fc"]
    new = with_weight_bits(config, dict(zip(names, (4, 2, 8), strict=True)), Path("/runs/a/final.safetensors"))
    for name, bits, act_bits in zip(names, (4, 2, 8), (3, 3, 8), strict=True):
        found = {}
        for pattern, widths in new.quant.overrides.items():
            if fnmatchcase(name, pattern):
                found |= widths
        assert found == {"weight_bits": bits, "act_bits": act_bits}
    assert not any("weight_bits" in w for p, w in new.quant.overrides.items() if fnmatchcase("headsX0.ab", p))
    was, now = config.describe(), new.describe()
    assert now["schedule"] == {**was["schedule"], "fp_epochs": 0}
    assert now.pop("weights") == "/runs/a/final.safetensors"
    for key in ("quant", "schedule"):
        was.pop(key), now.pop(key)
    assert now == {key: value for key, value in was.items() if key != "weights"}


def test_a_full_precision_run_is_quantised_by_the_default_method() -> None:
    assert with_weight_bits(TrainConfig(method="fp32"), {"fc": 4}, Path("x")).method == TrainConfig().method


def test_the_stem_of_published_weights_outlives_them() -> None:
    """Their checkpoint has it, whatever `auto` would mean for a file."""
    config = TrainConfig(weights="DEFAULT")
    assert (config.model.stem, config.network.stem) == ("auto", "standard")
    new = with_weight_bits(config, {"fc": 4}, Path("/runs/a/final.safetensors"))
    assert new.model.stem == new.network.stem == "standard"
