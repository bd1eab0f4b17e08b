"""Why onnxruntime keeps an operator in float, from the pattern around it in the file.

Each rule was found by experiment: a graph that has this one fault and runs in float, beside one without it that runs in
integers (tests/runtime_checks/test_reasons.py makes both, for each kind). They explain what was seen in the optimised
graph and predict nothing: nobody asks for the reasons of an operator that became an integer kernel. Where none applies,
the pattern is said.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import onnx

from mecdeploy.runtime_checks import weight_reasons
from mecdeploy.runtime_checks.activations import ACTIVATIONS, quantized_by
from mecdeploy.runtime_checks.inspection_report import Reason
from mecdeploy.runtime_checks.layers import (
    OPERANDS,
    known,
    label,
    value,
    weight_index,
    written_by,
)
from mecdeploy.runtime_checks.patterns import Graph

INTEGER_KERNELS = {
    "Conv": "QLinearConv",
    "Gemm": "QGemm",
    "MatMul": "QLinearMatMul",
    "Add": "QLinearAdd",
    "Mul": "QLinearMul",
    "AveragePool": "QLinearAveragePool",
    "GlobalAveragePool": "QLinearGlobalAveragePool",
    "Sigmoid": "QLinearSigmoid",
    "LeakyRelu": "QLinearLeakyRelu",
    "Softmax": "QLinearSoftmax",
    "Where": "QLinearWhere",
}
"""What onnxruntime makes of an operator between DequantizeLinear and QuantizeLinear."""

CARRIED = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "MaxPool", "Identity", "Cast", "Expand", "Dropout"}
)
"""What onnxruntime carries a DequantizeLinear or QuantizeLinear across, to bring it beside what computes."""

MOVED = frozenset(
    {"Flatten", "Resize", "DepthToSpace", "SpaceToDepth", "Concat", "Split", "Gather", "ReduceMax", "ReduceMin", "Pad"}
)
"""What runs on codes between DequantizeLinear and QuantizeLinear, but is no such bridge."""

CONSEQUENCES = ("float-input", "float-output")
"""Of operators beside a float one."""

QUANTIZING = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


def quantizes(proto: onnx.GraphProto) -> bool:
    """Whether anything in a graph is quantised."""
    kinds = {node.op_type for node in proto.node}
    integer = ("QLinear", "QGemm", "ConvInteger", "MatMulInteger", "MatMulNBits", "DynamicQuantizeMatMul")
    return bool(kinds & QUANTIZING) or any(kind.startswith(integer) for kind in kinds)


def computes(node: onnx.NodeProto) -> bool:
    """Whether a node of the file does more than to move or quantise values."""
    return node.op_type not in CARRIED | MOVED | QUANTIZING | {"Constant"}


def why_float(graph: Graph, node: onnx.NodeProto) -> tuple[Reason, ...]:
    """What keeps a node of the file from becoming an integer kernel; empty for what does not compute."""
    if not computes(node):
        return ()
    if node.op_type in ACTIVATIONS:
        return tuple(_activation(graph, node))
    if node.op_type not in INTEGER_KERNELS:
        return tuple(_without_kernel(graph, node))
    checked = {"Gemm": weight_reasons.layout, "Conv": weight_reasons.bias_scale}.get(node.op_type)
    found = [
        *_data(graph, node),
        *weight_reasons.weight(graph, node),
        *(checked(graph, node) if checked is not None else ()),
        *weight_reasons.bias(graph, node),
        *_output(graph, node),
    ]
    return tuple(found) or (Reason(kind="unknown", what=f"no known cause; around it: {_surroundings(graph, node)}"),)


def why_island(graph: Graph, nodes: Sequence[onnx.NodeProto]) -> tuple[Reason, ...]:
    """Why operators that feed each other stay float: where the island begins, without what only follows from it."""
    reasons = {label(node): why_float(graph, node) for node in nodes}
    every = tuple(dict.fromkeys(reason for found in reasons.values() for reason in found))
    causes = tuple(reason for reason in every if reason.kind not in CONSEQUENCES)
    kept = [f"{node.op_type} {label(node)}" for node in nodes if reasons[label(node)]]
    if causes or len(kept) < 2:
        return causes or every
    what = f"{_list(kept)} have integer kernels, but no QuantizeLinear and DequantizeLinear stand between them"
    return (Reason(kind="unquantised-inside", what=what),)


def _without_kernel(graph: Graph, node: onnx.NodeProto) -> Iterator[Reason]:
    if node.op_type in ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
        yield Reason(
            kind="dynamic",
            what=f"{node.op_type} multiplies integers and leaves a float result: the scale of its input or output is "
            "not in the file",
        )
    elif node.op_type == "MatMulNBits":
        yield Reason(kind="packed-weight", what="MatMulNBits multiplies float activations with unpacked weights")
    else:
        yield Reason(kind="no-integer-kernel", what=f"onnxruntime has no integer kernel for {node.op_type}")


def _activation(graph: Graph, node: onnx.NodeProto) -> Iterator[Reason]:
    """A Relu or Clip after a float operator is that one's business; on its own it has no kernel."""
    if not _writer_is_float(graph, node.input[0]):
        yield Reason(
            kind="no-integer-kernel",
            what=f"onnxruntime has no integer kernel for {node.op_type}, and drops one only before a QuantizeLinear "
            "that clamps as it does",
        )


def _data(graph: Graph, node: onnx.NodeProto) -> Iterator[Reason]:
    """What is multiplied, added or pooled has to come straight from a DequantizeLinear, as uint8."""
    weight = weight_index(graph, node) if node.op_type in OPERANDS else None
    bias = OPERANDS[node.op_type].bias if node.op_type in OPERANDS else None
    for index, name in enumerate(node.input):
        if not name or index in (weight, bias) or (node.op_type == "Where" and index == 0):
            continue
        source = _before(graph, name, CARRIED)
        if source is not None and source.op_type == "DequantizeLinear":
            yield from _codes(graph, source.input[0], source, "input")
        elif source is not None and source.op_type in MOVED and _is_dequantized(graph, name):
            yield Reason(
                kind="moved-input",
                what=f"{source.op_type} {label(source)} stands between DequantizeLinear and its input {name}",
            )
        elif known(graph, name) is not None:
            if any(_is_dequantized(graph, other) for other in node.input if other and other != name):
                yield Reason(kind="float-constant", what=f"its operand {name} is a float constant")
        elif source is None:
            yield Reason(kind="graph-input", what=f"its input {name} is one of the graph's, and is not quantised")
        else:
            yield Reason(kind="float-input", what=f"its input {name} is not quantised: {written_by(graph, name)}")


def _codes(graph: Graph, codes: str, quantizer: onnx.NodeProto, side: str) -> Iterator[Reason]:
    """Codes of an activation, beside their QuantizeLinear or DequantizeLinear: 8 bits; signed ones are delicate."""
    zero_point = value(graph, quantizer.input, 2)
    kind = "uint8" if zero_point is None else str(zero_point.dtype)
    if kind not in ("uint8", "int8"):
        yield Reason(
            kind="activation-type", what=f"its {side} {codes} is stored as {kind}; integer kernels take 8 bits"
        )
    if kind != "int8":
        return
    if known(graph, codes) is not None:
        return
    writer, readers = graph.producers.get(codes), graph.consumers.get(codes, [])
    others = [reader for reader in readers if reader.op_type != "DequantizeLinear"]
    if writer is None or writer.op_type != "QuantizeLinear":
        obstacle = f"{written_by(graph, codes)}"
    elif others:
        obstacle = f"{_list([f'{reader.op_type} {label(reader)}' for reader in others])} reads it"
    elif (count := _readers_of_codes(graph, codes)) != 1:
        obstacle = f"{count} operators read it"
    else:
        return
    yield Reason(
        kind="signed-activation",
        what=f"its {side} {codes} is int8; onnxruntime makes uint8 of it, as its kernels need, only where a "
        f"QuantizeLinear, one DequantizeLinear and one operator follow each other: {obstacle}",
    )


def _readers_of_codes(graph: Graph, codes: str) -> int:
    """How many operators read codes, through DequantizeLinear: each gets a DequantizeLinear of its own."""
    readers = graph.consumers.get(codes, [])
    return sum(
        len(graph.consumers.get(reader.output[0], [])) if reader.op_type == "DequantizeLinear" else 1
        for reader in readers
    ) + (codes in graph.outputs)


def _output(graph: Graph, node: onnx.NodeProto) -> Iterator[Reason]:
    """What a kernel writes has to go to one QuantizeLinear and nowhere else; a Gemm's result may stay float."""
    (tensor, *_) = node.output
    readers = graph.consumers.get(tensor, [])
    while len(readers) == 1 and tensor not in graph.outputs:
        (reader,) = readers
        following = graph.consumers.get(reader.output[0], [])
        if reader.op_type == "QuantizeLinear":
            yield from _codes(graph, reader.output[0], reader, "output")
            return
        quantize = quantized_by(graph, tensor)
        if reader.op_type in ACTIVATIONS and quantize is not None:
            if (kept := _kept(graph, reader, quantize)) is not None:
                yield kept
                return
        elif reader.op_type not in CARRIED:
            if [item.op_type for item in following] == ["QuantizeLinear"]:
                what = f"{reader.op_type} {label(reader)} stands between it and its QuantizeLinear"
                yield Reason(kind="operator-before-quantize", what=what)
                return
            break
        tensor, readers = reader.output[0], following
    if node.op_type == "Gemm":
        return
    others = [f"{item.op_type} {label(item)}" for item in readers if item.op_type != "QuantizeLinear"]
    quantizers = len(readers) - len(others)
    others += ["the graph's output"] if tensor in graph.outputs else []
    if quantizers:
        others += [f"{quantizers} QuantizeLinear"]
        what = f"its float output {tensor} goes to {_list(others)}, where one QuantizeLinear has to be its only reader"
        yield Reason(kind="output-read-twice", what=what)
    else:
        yield Reason(kind="float-output", what=f"its output {tensor} is not quantised: it goes to {_list(others)}")


def _kept(graph: Graph, activation: onnx.NodeProto, quantize: onnx.NodeProto) -> Reason | None:
    """Why onnxruntime cannot drop a Relu or Clip before a QuantizeLinear; None where that one clamps as much."""
    who = f"{activation.op_type} {label(activation)} stands between it and its QuantizeLinear"
    zero_point, scale = value(graph, quantize.input, 2), value(graph, quantize.input, 1)
    if scale is None or scale.size != 1 or (zero_point is not None and zero_point.size != 1):
        return Reason(kind="activation-before-quantize", what=who)
    limits = np.iinfo(np.uint8 if zero_point is None else zero_point.dtype)
    zero = 0 if zero_point is None else int(zero_point.item())
    low, high = ((end - zero) * float(scale.item()) for end in (limits.min, limits.max))
    least, most = (value(graph, activation.input, index) for index in (1, 2))
    lowest = 0.0 if activation.op_type == "Relu" else low if least is None else float(least.item())
    highest = high if activation.op_type == "Relu" or most is None else float(most.item())
    slack = 1e-6 * (high - low)  # scales are float32
    if lowest <= low + slack and highest >= high - slack:
        return None
    what = f"{who}, which clamps less (to {low:.3g}..{high:.3g}), so that it cannot be dropped"
    return Reason(kind="activation-before-quantize", what=what)


def _before(graph: Graph, tensor: str, seen_through: Collection[str]) -> onnx.NodeProto | None:
    """The first node that is not of these op types, on the way back from a tensor; None for an input or constant."""
    node = graph.producers.get(tensor)
    while node is not None and node.op_type in seen_through:
        node = graph.producers.get(node.input[0])
    return node


def _is_dequantized(graph: Graph, tensor: str) -> bool:
    """Whether a float tensor comes from a DequantizeLinear through what only moves values."""
    node = _before(graph, tensor, CARRIED | MOVED)
    return node is not None and node.op_type == "DequantizeLinear"


def _writer_is_float(graph: Graph, tensor: str) -> bool:
    """Whether an operator computes a tensor in float, seen through what only moves values."""
    node = _before(graph, tensor, CARRIED | MOVED | set(ACTIVATIONS))
    return node is not None and node.op_type not in QUANTIZING


def _surroundings(graph: Graph, node: onnx.NodeProto) -> str:
    """DequantizeLinear, DequantizeLinear -> Conv -> QuantizeLinear."""
    before = [graph.producers[name].op_type if name in graph.producers else "constant" for name in node.input if name]
    after = [reader.op_type for name in node.output for reader in graph.consumers.get(name, [])]
    return f"{', '.join(before)} -> {node.op_type} -> {', '.join(after) or 'output'}"


def _list(parts: list[str], most: int = 3) -> str:
    shown = ", ".join(parts[:most])
    return shown if len(parts) <= most else f"{shown} and {len(parts) - most} more"
