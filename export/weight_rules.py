"""What a Conv and a Gemm demand of their weight, its scales and its bias."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mecdeploy.export.graph import Conv, Gemm, IntegerGraph, Weight
from mecdeploy.export.packing import plain_range
from mecdeploy.export.refusal import quantization_of, refuse

TRAINED_BITS = (1, 2, 3, 4, 8)
STORAGE_BITS = {"": (0, 1, 2, 3, 4, 8), "int8": (8,), "int4": (4,), "int2": (2,), "table": (1, 2, 3, 4)}
"""Weight storage -> the packed widths it can hold."""


def check_conv(node: Conv, graph: IntegerGraph) -> None:
    """Channels fit the weight and its groups, and the weight fits an integer kernel."""
    channels = graph.values[node.input].shape[0]
    out_channels, per_group = node.weight.codes.shape[:2]
    if node.groups < 1 or channels != per_group * node.groups or out_channels % node.groups:
        refuse(
            node,
            f"reads {node.input} with {channels} channels in {node.groups} groups; "
            f"its weight {node.weight.codes.shape} does not fit",
        )
    _check_weight(node, graph)


def check_gemm(node: Gemm, graph: IntegerGraph) -> None:
    """The weight fits an integer kernel."""
    _check_weight(node, graph)


def _check_weight(node: Conv | Gemm, graph: IntegerGraph) -> None:
    weight, out_channels = node.weight, node.weight.codes.shape[0]
    if weight.codes.dtype != np.int8:
        refuse(node, f"has {weight.codes.dtype} weight codes; they must be int8")
    if weight.bits not in TRAINED_BITS:
        refuse(node, f"has {weight.bits}-bit weights; packed export needs 1, 2, 3, 4 or 8")
    if weight.levels is None:
        _check_range(node, weight, weight.bits)
    else:
        _check_levels(node, weight, weight.levels)
    _check_storage(node, weight)
    if weight.scale.dtype != np.float32 or weight.scale.shape != (out_channels,):
        refuse(node, f"has weight scales {weight.scale.dtype} {weight.scale.shape}; float32 ({out_channels},) is due")
    if node.bias.dtype != np.int32 or node.bias.shape != (out_channels,):
        refuse(node, f"has a bias {node.bias.dtype} {node.bias.shape}; int32 ({out_channels},) is due")
    _check_scales(node, graph)
    _check_accumulator(node, graph)


def _check_range(node: Conv | Gemm, weight: Weight, bits: int) -> None:
    if bits == 1:
        refuse(node, "has 1-bit weights without levels; say what the two are")
    low, high = plain_range(bits)
    smallest, largest = int(weight.codes.min()), int(weight.codes.max())
    if smallest < low or largest > high:
        refuse(node, f"has weight codes {smallest}..{largest}; {bits} bits hold {low}..{high}")


def _check_levels(node: Conv | Gemm, weight: Weight, levels: NDArray[np.int8]) -> None:
    if levels.dtype != np.int8 or levels.ndim not in (1, 2) or not levels.size:
        refuse(node, f"has weight levels {levels.dtype} {levels.shape}; int8 (n,) or (n, width) is due")
    if levels.ndim == 2:
        _check_codebook(node, weight, levels)
        return
    if weight.bits > 4 or levels.size > 1 << weight.bits:
        refuse(node, f"has {levels.size} weight levels at {weight.bits} bits; 1 to 4 bits hold 2^bits of them")
    if (np.diff(levels.astype(np.int16)) <= 0).any():
        refuse(node, f"has weight levels {levels.tolist()}; they must ascend")
    others = np.setdiff1d(weight.codes, levels)
    if others.size:
        refuse(node, f"has the weight code {others[0]}, which is none of its levels {levels.tolist()}")


def _check_codebook(node: Conv | Gemm, weight: Weight, vectors: NDArray[np.int8]) -> None:
    count, width = vectors.shape
    inputs = weight.codes[0].size
    bits = math.ceil(math.log2(count) / width)
    if count > 256 or bits != weight.bits:
        refuse(node, f"has a codebook of {count} vectors of {width} at {weight.bits} bits; one byte is to hold them")
    if inputs % width:
        refuse(node, f"has {inputs} weights in a filter, which vectors of {width} do not divide")
    known = {vector.tobytes() for vector in vectors}
    if any(vector.tobytes() not in known for vector in np.unique(weight.codes.reshape(-1, width), axis=0)):
        refuse(node, f"has weight codes that are no vectors of its codebook of {count}")


def _check_storage(node: Conv | Gemm, weight: Weight) -> None:
    if weight.storage not in STORAGE_BITS:
        refuse(node, f"stores its weight as {weight.storage!r}; one of int8, int4, int2, table is due")
    if weight.packed_bits not in STORAGE_BITS[weight.storage]:
        refuse(node, f"packs its weight at {weight.packed_bits} bits, which {weight.storage or 'no'} storage holds")
    if 0 < weight.packed_bits < weight.bits:
        refuse(node, f"packs {weight.bits}-bit weights at {weight.packed_bits} bits, which would change them")
    if weight.packed_levels is not None and weight.storage not in ("", "table"):
        refuse(node, f"stores weight levels as {weight.storage}, which holds the plain range; use table")
    if weight.packed_bits > weight.bits and weight.levels is not None:
        _check_range(node, weight, weight.packed_bits)


def _check_scales(node: Conv | Gemm, graph: IntegerGraph) -> None:
    """The product of input and weight scale is the bias's scale: it must not vanish in float32."""
    quantization = quantization_of(graph, node.input)
    with np.errstate(all="ignore"):
        product = np.float32(quantization.scale) * node.weight.scale
    for what, scales in (("weight scale", node.weight.scale), ("input scale times weight scale", product)):
        bad = ~(np.isfinite(scales) & (scales >= np.finfo(np.float32).tiny))
        if bad.any():
            channel = int(bad.argmax())
            refuse(
                node,
                f"output channel {channel} has {what} {scales[channel]}; "
                "it must be finite, positive and a normal float32",
            )


def _check_accumulator(node: Conv | Gemm, graph: IntegerGraph) -> None:
    """No input can overflow the int32 accumulator."""
    quantization = quantization_of(graph, node.input)
    farthest = max(quantization.zero_point, quantization.qmax - quantization.zero_point)
    absolute = np.abs(node.weight.codes.reshape(node.bias.size, -1), dtype=np.int16)
    sums = absolute.sum(axis=1, dtype=np.int64) * farthest + np.abs(node.bias.astype(np.int64))
    if int(sums.max()) > np.iinfo(np.int32).max:
        refuse(node, f"output channel {int(sums.argmax())} can reach {int(sums.max())}, beyond an int32 accumulator")
