"""Which width each layer's weights get: the least summed loss whose packed weights fit into a size.

Imports no torch. Sizes are those of the file that `mecdeploy export` writes for onnxruntime.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mecdeploy.training.config import TrainConfig
from mecdeploy.training.errors import TrainingError

WEIGHTS_PER_WORD = {1: (8, 1), 2: (4, 1), 3: (5, 2), 4: (2, 1), 8: (1, 1)}
"""bits -> (weights, bytes) of one packed word; the last word of a layer is filled up."""

TABLE_BYTES_3BIT = 32768 * 5
"""ONNX has no 3-bit type: the file holds one table that unpacks five weights from a uint16, shared by all layers."""

FRONT_LIMIT = 20_000
"""States that the search keeps per layer. Below it, the search is exact."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|[A-Za-z]*)")


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` weights take at a width, without the 3-bit table."""
    weights, size = WEIGHTS_PER_WORD[bits]
    return -(-count // weights) * size


def packed_size(counts: Mapping[str, int], bits: Mapping[str, int]) -> int:
    """Bytes of all packed weights in the exported file, the 3-bit table included.

    counts: weights by unit. bits: width by unit.
    """
    table = TABLE_BYTES_3BIT if 3 in bits.values() else 0
    return table + sum(packed_bytes(count, bits[name]) for name, count in counts.items())


def parse_size(text: str, largest: int) -> int:
    """Bytes that "70%" (of `largest`), "1.2MB", "300 KiB" or "40000" mean, rounded down.

    Raises TrainingError for anything else, and for 0.
    """
    match = _SIZE.fullmatch(text.strip())
    factor = None if match is None else largest / 100 if match[2] == "%" else _UNITS.get(match[2].upper())
    size = 0 if match is None or factor is None else math.floor(float(match[1]) * factor)
    if size < 1:
        raise TrainingError(
            f"size is {text!r}; give bytes (40000, 300KB, 1.2MB, 1MiB) or a share of the 8-bit weights (70%)."
        )
    return size


def monotone_costs(increases: Mapping[int, float]) -> dict[int, float]:
    """What each width costs, bits -> cost >= 0: never less than a wider one costs.

    increases: bits -> measured mean increase of the loss. It can be negative, or smaller at fewer bits, by chance
    alone; taken literally, such a number would pay for a narrower width.
    """
    costs, worst = {}, 0.0
    for bits in sorted(increases, reverse=True):
        worst = max(worst, increases[bits])
        costs[bits] = worst
    return costs


def allocate(counts: Mapping[str, int], costs: Mapping[str, Mapping[int, float]], budget: int) -> dict[str, int]:
    """Bits by unit with the least summed cost among all whose packed_size is at most `budget`.

    counts: weights by unit. costs: unit -> bits -> cost, as of `monotone_costs`; only these widths are open to a unit.
    A multiple-choice knapsack, solved by dynamic programming over the states (bytes, cost) that no other state beats in
    both. Exact up to FRONT_LIMIT states; beyond, of states whose bytes differ by less than budget / FRONT_LIMIT only
    the cheapest goes on, so the result fits still and is optimal for a budget smaller by that times the layers. Bytes
    that no cost asks for go to the narrowest layers. Raises TrainingError, naming the least size, when nothing fits.
    """
    widths = sorted({bits for options in costs.values() for bits in options})
    found = [_search(counts, costs, [bits for bits in widths if bits != 3], budget)]
    if 3 in widths:
        found.append(_search(counts, costs, widths, budget - TABLE_BYTES_3BIT))
    candidates = [bits for bits in found if bits is not None]
    if not candidates:
        least = packed_size(counts, {name: min(costs[name]) for name in counts})
        raise TrainingError(
            f"size is {budget:,} bytes, but all weights at {widths[0]} bits take {least:,}; give at least that."
        )
    best = min(candidates, key=lambda bits: sum(costs[name][bits[name]] for name in counts))
    return _spend(best, counts, costs, budget)


def _search(
    counts: Mapping[str, int], costs: Mapping[str, Mapping[int, float]], widths: list[int], budget: int
) -> dict[str, int] | None:
    """The cheapest choice among `widths` for a budget without any table, or None."""
    sizes, totals = np.zeros(1, np.int64), np.zeros(1)
    trail = []
    for name, count in counts.items():
        step = np.array([packed_bytes(count, bits) for bits in widths])
        price = np.array([costs[name].get(bits, np.inf) for bits in widths])
        sizes, totals = (sizes[:, None] + step).ravel(), (totals[:, None] + price).ravel()
        kept = _undominated(sizes, totals, budget)
        sizes, totals = sizes[kept], totals[kept]
        trail.append(kept)
    if not len(sizes):
        return None
    bits: dict[str, int] = {}
    state = len(sizes) - 1  # the cheapest is the largest
    for name, kept in zip(reversed(list(counts)), reversed(trail), strict=True):
        state, choice = divmod(int(kept[state]), len(widths))
        bits[name] = widths[choice]
    return {name: bits[name] for name in counts}


def _undominated(sizes: NDArray[np.int64], totals: NDArray[np.float64], budget: int) -> NDArray[np.intp]:
    """Indices, by size, of the states within the budget that are cheaper than every smaller one."""
    order = np.lexsort((totals, sizes))
    order = order[(sizes[order] <= budget) & np.isfinite(totals[order])]
    before = np.minimum.accumulate(np.concatenate([[np.inf], totals[order]]))[:-1]
    order = order[totals[order] < before]
    if len(order) > FRONT_LIMIT:
        buckets = sizes[order] * FRONT_LIMIT // (budget + 1)
        last_of_bucket = np.append(buckets[1:] != buckets[:-1], True)  # the cheapest of it
        order = order[last_of_bucket]
    return order


def _spend(
    bits: dict[str, int], counts: Mapping[str, int], costs: Mapping[str, Mapping[int, float]], budget: int
) -> dict[str, int]:
    """Widen layers, the narrowest first, while the budget lasts: costs never rise with the width."""
    widened = dict(bits)
    for width in sorted({width for options in costs.values() for width in options}):
        if width == 3 and 3 not in bits.values():
            continue  # never a table for nothing
        for name in sorted(counts, key=counts.__getitem__):
            wider = {**widened, name: width}
            if width in costs[name] and widened[name] < width and packed_size(counts, wider) <= budget:
                widened = wider
    return widened


def with_weight_bits(config: TrainConfig, bits: Mapping[str, int], checkpoint: Path) -> TrainConfig:
    """The settings of a run that trains with these weight bits, from the full-precision weights in `checkpoint`.

    bits: by unit; units left out keep what the run's settings give them. Everything else is the given run's, the
    activation bits of its overrides included. A run of method fp32 gets the default method: it is to be quantised now.
    """
    overrides = {
        pattern: {key: value for key, value in widths.items() if key != "weight_bits"}
        for pattern, widths in config.quant.overrides.items()
    }
    for name, width in bits.items():
        overrides.setdefault(glob.escape(name), {})["weight_bits"] = width
    overrides = {pattern: widths for pattern, widths in overrides.items() if widths}
    return dataclasses.replace(
        config,
        method=TrainConfig().method if config.method == "fp32" else config.method,
        weights=str(checkpoint),
        model=config.network,  # whose stem could have come with the weights that this one replaces
        quant=dataclasses.replace(config.quant, overrides=overrides),
        schedule=dataclasses.replace(config.schedule, fp_epochs=0),
    )
