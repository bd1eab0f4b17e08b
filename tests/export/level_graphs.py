"""The hand-made graphs with weights on other levels than the plain range, and levels of every kind."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mecdeploy.export.graph import Conv, Gemm, IntegerGraph, Weight

VECTORS = 40


@dataclass(frozen=True)
class Grid:
    """bits: of a weight. levels: None for a codebook. per_byte: (weights, bytes) of one stored code."""

    bits: int
    levels: tuple[int, ...] | None
    per_code: tuple[int, int]

    @property
    def largest(self) -> int:
        return 127 if self.levels is None else max(map(abs, self.levels))


GRIDS = {
    "binary": Grid(1, (-1, 1), (8, 1)),
    "ternary": Grid(2, (-1, 0, 1), (5, 1)),
    "odd, 2 bits": Grid(2, (-3, -1, 1, 3), (4, 1)),
    "odd, 3 bits": Grid(3, tuple(range(-7, 8, 2)), (5, 2)),
    "odd, 4 bits": Grid(4, tuple(range(-15, 16, 2)), (2, 1)),
    "two learned": Grid(1, (-127, 90), (8, 1)),
    "three learned": Grid(2, (-127, 3, 101), (5, 1)),
    "learned, 2 bits": Grid(2, (-127, -31, 28, 111), (4, 1)),
    "learned, 3 bits": Grid(3, (-120, -70, -33, -5, 4, 30, 77, 127), (5, 2)),
    "learned, 4 bits": Grid(4, (-127, -99, -71, -50, -32, -18, -9, -1, 2, 7, 17, 31, 52, 69, 88, 126), (2, 1)),
    "codebook": Grid(2, None, (4, 1)),
}


def on_grid(graph: IntegerGraph, grid: Grid, seed: int = 0) -> IntegerGraph:
    """The graph with all weights below 8 bits on the grid, codes at random, scales such that reals keep their size.

    A codebook takes the layers whose filters divide into fours.
    """
    rng = np.random.default_rng(seed)

    def changed(weight: Weight) -> Weight:
        if weight.bits == 8 or (grid.levels is None and weight.codes[0].size % 4):
            return weight
        if grid.levels is None:
            levels = rng.integers(-127, 128, (VECTORS, 4)).astype(np.int8)
            codes = levels[rng.integers(0, VECTORS, weight.codes.size // 4)].reshape(weight.codes.shape)
        else:
            levels = np.array(grid.levels, np.int8)
            codes = levels[rng.integers(0, levels.size, weight.codes.shape)]
        ratio = np.std(weight.codes.astype(float)) / np.std(codes.astype(float))
        scale = (weight.scale * ratio).astype(np.float32)
        return replace(weight, codes=codes, bits=grid.bits, scale=scale, levels=levels)

    return replace(
        graph,
        nodes=tuple(
            replace(node, weight=changed(node.weight), bias=(node.bias * _bias_ratio(node, grid)).astype(np.int32))
            if isinstance(node, Conv | Gemm)
            else node
            for node in graph.nodes
        ),
    )


def _bias_ratio(node: Conv | Gemm, grid: Grid) -> float:
    """Bias codes are in steps of the weight scale."""
    return 1.0 if node.weight.bits == 8 else grid.largest / (1 << (node.weight.bits - 1))
