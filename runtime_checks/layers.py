"""Layers with weights in any ONNX graph, and how their weights are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mecdeploy.runtime_checks.errors import CheckError
from mecdeploy.runtime_checks.inspection_report import Weights
from mecdeploy.runtime_checks.patterns import Graph, attributes_of
from mecdeploy.runtime_checks.weights import Constant

RESHAPING = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast")
"""What may stand between a weight and the layer that multiplies with it."""

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Which inputs of an op type are what; None where it has none of its own, and DequantizeLinear has it."""

    data: int = 0
    weight: int = 1
    bias: int | None = 2
    scales: tuple[int, int, int] | None = None
    zero_points: tuple[int, int, int] | None = None


_QLINEAR = Operands(data=0, weight=3, bias=8, scales=(1, 4, 6), zero_points=(2, 5, 7))
OPERANDS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm"), Operands()),
    **dict.fromkeys(("MatMul", "FusedMatMul"), Operands(bias=None)),
    **dict.fromkeys(("ConvInteger", "MatMulInteger"), Operands(bias=None, zero_points=(2, 3, -1))),
    "QLinearConv": _QLINEAR,
    "QLinearMatMul": Operands(data=0, weight=3, bias=None, scales=(1, 4, 6), zero_points=(2, 5, 7)),
    "QGemm": Operands(data=0, weight=3, bias=6, scales=(1, 4, 7), zero_points=(2, 5, 8)),
    "MatMulIntegerToFloat": Operands(bias=6, scales=(2, 3, -1), zero_points=(4, 5, -1)),
    "DynamicQuantizeMatMul": Operands(bias=4, scales=(-1, 2, -1), zero_points=(-1, 3, -1)),
    "MatMulNBits": Operands(bias=5, scales=(-1, 2, -1), zero_points=(-1, 3, -1)),
}
"""Op types that multiply with weights, in standard ONNX and in onnxruntime's own domain. Of scales and zero points: of
the data, of the weights, of the output; -1 where there is none."""


@dataclass(frozen=True, kw_only=True)
class FoundWeight:
    """A weight as the graph has it. dequantize: the DequantizeLinear it goes through, if it does.

    scale, zero_point: None without one, or where the file does not hold it. axis: of scale, None for one of all.
    block: how many values share a scale along the axis; 0 for all.
    """

    constant: Constant
    dequantize: onnx.NodeProto | None
    scale: Array | None
    zero_point: Array | None
    axis: int | None
    block: int


def known(graph: Graph, name: str) -> Constant | None:
    """A value that follows from the file alone, or None where it does not or cannot be read."""
    try:
        return graph.constants.get(name)
    except CheckError:
        return None


def label(node: onnx.NodeProto) -> str:
    """A node as messages name it: its name, or the tensor it writes."""
    return str(node.name or next((name for name in node.output if name), node.op_type))


def written_by(graph: Graph, tensor: str) -> str:
    """Who writes a tensor, in words."""
    node = graph.producers.get(tensor)
    if node is not None:
        return f"{node.op_type} {label(node)} writes it"
    return "it is an input of the graph" if known(graph, tensor) is None else "it is a constant of the file"


def value(graph: Graph, names: Sequence[str], index: int | None) -> Array | None:
    """Input `index` of a node where there is one and the file holds it."""
    if index is None or not 0 <= index < len(names) or not names[index]:
        return None
    found = known(graph, names[index])
    return found.value if found is not None else None


def weight_index(graph: Graph, node: onnx.NodeProto) -> int | None:
    """Which input of a node is its weight; None where it has none that the file holds."""
    operands = OPERANDS.get(node.op_type)
    if operands is None:
        return None
    candidates = (1, 0) if node.op_type in ("MatMul", "FusedMatMul") else (operands.weight,)
    return next((index for index in candidates if find_weight(graph, node, index) is not None), None)


def find_weight(graph: Graph, node: onnx.NodeProto, index: int) -> FoundWeight | None:
    """Follow an input back to the constant it comes from, through a DequantizeLinear and what only reshapes."""
    if index >= len(node.input):
        return None
    name = node.input[index]
    source = graph.producers.get(name)
    while source is not None and source.op_type in RESHAPING and known(graph, name) is None:
        name = source.input[0]
        source = graph.producers.get(name)
    if source is None or source.op_type != "DequantizeLinear":
        constant = known(graph, name)
        if constant is None:
            return None
        operands = OPERANDS[node.op_type]
        scale = value(graph, node.input, operands.scales[1] if operands.scales else None)
        zero_point = value(graph, node.input, operands.zero_points[1] if operands.zero_points else None)
        return FoundWeight(
            constant=constant, dequantize=None, scale=scale, zero_point=zero_point, axis=None,
            block=int(attributes_of(node).get("block_size", 0)),
        )  # fmt: skip
    constant = known(graph, source.input[0])
    if constant is None:
        return None
    scale, attributes = value(graph, source.input, 1), attributes_of(source)
    return FoundWeight(
        constant=constant,
        dequantize=source,
        scale=scale,
        zero_point=value(graph, source.input, 2),
        axis=attributes.get("axis", 1) if scale is not None and scale.size > 1 else None,
        block=attributes.get("block_size", 0),
    )


def measure(graph: Graph, node: onnx.NodeProto, found: FoundWeight) -> Weights:
    """How the weight of a node is stored, and what of it is used."""
    constant = found.constant if node.op_type != "MatMulNBits" else _unpacked(node, found.constant)
    integers = constant.value if constant.value.dtype.kind in "iu" else None
    zero_point, dtype = found.zero_point, str(constant.value.dtype)
    if constant.storage in ("int4", "int2") and found.dequantize is not None:
        dtype = constant.storage if found.dequantize.input[0] == constant.source else dtype  # no Cast in between
    if constant.storage in ("uint4", "uint2") and integers is None:  # ml_dtypes' own types
        integers = constant.value.astype(np.uint8)
    distinct = np.unique(integers) if integers is not None and integers.size else None
    per = None
    if found.scale is not None:
        per = "block" if found.block else "channel" if found.scale.size > 1 else "tensor"
    return Weights(
        tensor=constant.source,
        shape=tuple(constant.value.shape),
        dtype=dtype,
        storage=constant.storage,
        stored_bits=constant.bits,
        used_bits=None if integers is None else min(constant.bits, _width(integers, zero_point, found.axis)),
        levels=None if distinct is None else int(distinct.size),
        smallest=None if distinct is None else int(distinct[0]),
        largest=None if distinct is None else int(distinct[-1]),
        per=per,
        scale=ends(found.scale),
        zero_point=whole_ends(zero_point),
        clip=constant.clipped,
        bytes=constant.stored_bytes,
        table_bytes=graph.own_tables(constant),
    )


def bias_of(graph: Graph, node: onnx.NodeProto) -> tuple[str | None, int]:
    """Type of a layer's bias in the file and how many numbers it has; None and 0 without one."""
    index = OPERANDS[node.op_type].bias
    if index is None or index >= len(node.input) or not node.input[index]:
        return None, 0
    source = graph.producers.get(node.input[index])
    name = source.input[0] if source is not None and source.op_type == "DequantizeLinear" else node.input[index]
    found = known(graph, name)
    return ("computed", 0) if found is None else (str(found.value.dtype), found.value.size)


def _unpacked(node: onnx.NodeProto, blocks: Constant) -> Constant:
    """MatMulNBits' weights [N, K]: unsigned fields of `bits`, lowest first, in bytes [N, blocks, bytes of a block]."""
    attributes = attributes_of(node)
    bits, rows, columns = (int(attributes[name]) for name in ("bits", "N", "K"))
    fields = (blocks.value.astype(np.uint8)[..., None] >> np.arange(0, 8, bits)) & (2**bits - 1)
    codes = fields.reshape(rows, -1)[:, :columns].astype(np.uint8)
    return replace(blocks, value=codes, storage=f"uint{bits}", bits=bits, per_code=8 // bits)


def _width(integers: Array, zero_point: Array | None, axis: int | None) -> int:
    """Bits that hold every value less its zero point."""
    low, high = int(integers.min(initial=0)), int(integers.max(initial=0))
    if zero_point is not None and zero_point.dtype.kind in "iu" and zero_point.any():
        shape = [1] * integers.ndim
        if axis is not None and zero_point.ndim == 1 and zero_point.size == integers.shape[axis]:
            shape[axis] = -1
        if zero_point.size == 1 or -1 in shape:
            centred = integers.astype(np.int64) - zero_point.astype(np.int64).reshape(shape)
            low, high = int(centred.min(initial=0)), int(centred.max(initial=0))
    return bits_of(low, high)


def bits_of(low: int, high: int) -> int:
    """Bits that hold every integer of a range, in two's complement if one is negative."""
    return max(1, high.bit_length() if low >= 0 else 1 + max((-low - 1).bit_length(), high.bit_length()))


def ends(values: Array | None) -> tuple[float, float] | None:
    """Smallest and largest of the values, if there are any."""
    if values is None or not values.size:
        return None
    numbers = values.astype(np.float64)
    return float(numbers.min()), float(numbers.max())


def whole_ends(values: Array | None) -> tuple[int, int] | None:
    """Smallest and largest of integers, if there are any."""
    found = ends(values) if values is not None and values.dtype.kind in "iu" else None
    return None if found is None else (int(found[0]), int(found[1]))
