"""How many bits each weight takes in the file: what it was trained at, or wider where the user asks."""

from __future__ import annotations

from dataclasses import replace

from mecdeploy.export.config import ExportConfig
from mecdeploy.export.errors import ExportError
from mecdeploy.export.graph import Conv, Gemm, IntegerGraph, Weight
from mecdeploy.export.packing import plain_range


def choose_packed_bits(graph: IntegerGraph, config: ExportConfig) -> IntegerGraph:
    """Set every weight's packed_bits.

    config.bits None: the trained width. Otherwise weights trained at that width or less take it, and weights trained
    wider keep their own (the 8-bit first and last layer of a 4-bit run), as do levels outside the width's plain range,
    where a table of their own stays the only storage. Raises ExportError when config.bits is below
    the run's own width (the widest under 8 bits, or 8 when none is): it would round trained weights once more.
    """
    if config.bits is not None:
        _require_wide_enough(graph, config.bits)
    return replace(
        graph,
        nodes=tuple(
            replace(node, weight=replace(node.weight, packed_bits=_packed_bits(node.weight, config.bits or 0)))
            if isinstance(node, Conv | Gemm)
            else node
            for node in graph.nodes
        ),
    )


def _packed_bits(weight: Weight, asked: int) -> int:
    if weight.levels is not None and asked > weight.bits:
        low, high = plain_range(asked)
        if int(weight.levels.min()) < low or int(weight.levels.max()) > high:
            return weight.bits
    return max(weight.bits, asked)


def _require_wide_enough(graph: IntegerGraph, bits: int) -> None:
    weighted = [node for node in graph.nodes if isinstance(node, Conv | Gemm)]
    candidates = [node for node in weighted if node.weight.bits < 8] or weighted
    widest = max(candidates, key=lambda node: node.weight.bits, default=None)
    if widest is not None and bits < widest.weight.bits:
        trained = widest.weight.bits
        raise ExportError(
            f"{widest.name}: its weights were trained at {trained} bits; packing them at {bits} would round them once "
            f"more and change what was trained. Export with {trained} bits or wider, "
            f"or train again with quant.weight_bits = {bits}."
        )
