"""Why onnxruntime keeps an operator in float, from the pattern around it in the file.

Each rule was found by experiment: a graph that has this one fault and runs in float, beside one without it that runs in
integers (tests/runtime_checks/test_reasons.py makes both, for each kind). They explain what was seen in the optimised
graph and predict nothing: nobody asks for the reasons of an operator that became an integer kernel. Where none applies,
the pattern is said.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from mecdeploy.runtime_checks.inspection_report import Reason
from mecdeploy.runtime_checks.layers import (
    ACTIVATIONS,
    OPERANDS,
    RESHAPING,
    find_weight,
    known,
    quantized_by,
    value,
    weight_index,
)
from mecdeploy.runtime_checks.patterns import MOVING, Graph, attributes_of

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
    "Concat": "QLinearConcat",
    "Where": "QLinearWhere",
}
"""What onnxruntime makes of an operator between DequantizeLinear and QuantizeLinear."""

CONSEQUENCES = ("float-input", "float-output")
"""Of operators beside a float one: within an island the other reasons say where it begins."""

QUANTIZING = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
BIAS_TOLERANCE = 0.01
"""By how much of itself a bias scale may be off input scale times weight scale, in onnxruntime 1.32."""


def quantizes(proto: onnx.GraphProto) -> bool:
    """Whether anything in a graph is quantised."""
    kinds = {node.op_type for node in proto.node}
    integer = ("QLinear", "QGemm", "ConvInteger", "MatMulInteger", "MatMulNBits", "DynamicQuantizeMatMul")
    return bool(kinds & QUANTIZING) or any(kind.startswith(integer) for kind in kinds)


def why_float(graph: Graph, node: onnx.NodeProto) -> tuple[Reason, ...]:
    """What keeps a node of the file from becoming an integer kernel; empty for what does not compute."""
    if node.op_type in (*RESHAPING, *MOVING, *QUANTIZING, "Constant") and node.op_type not in ("Clip", "Concat"):
        return ()
    if node.op_type in ACTIVATIONS:
        return tuple(_activation(graph, node))
    if node.op_type == "Concat" and not any(_writer_is_float(graph, name) for name in node.input):
        return ()
    if node.op_type not in INTEGER_KERNELS:
        return tuple(_without_kernel(graph, node))
    found = [*_data(graph, node), *_weight(graph, node), *_bias(graph, node), *_output(graph, node)]
    return tuple(found) or (Reason(kind="unknown", what=f"no known cause; around it: {_surroundings(graph, node)}"),)


def label(node: onnx.NodeProto) -> str:
    """A node as messages name it: its name, or the tensor it writes."""
    return str(node.name or next((name for name in node.output if name), node.op_type))


def written_by(graph: Graph, tensor: str) -> str:
    """Who writes a tensor, in words."""
    node = graph.producers.get(tensor)
    if node is not None:
        return f"{node.op_type} {label(node)} writes it"
    return "it is an input of the graph" if known(graph, tensor) is None else "it is a constant of the file"


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
        source = graph.producers.get(name)
        if source is not None and source.op_type == "DequantizeLinear":
            yield from _codes(graph, source.input[0], source, "input")
        elif source is not None and source.op_type in RESHAPING and _dequantized_before(graph, name) is not None:
            yield Reason(
                kind="moved-input",
                what=f"{source.op_type} {label(source)} stands between DequantizeLinear and its input {name}",
            )
        elif known(graph, name) is not None:
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
        what=f"its {side} {codes} is int8, which onnxruntime turns into the uint8 of its kernels only where one "
        f"DequantizeLinear follows the QuantizeLinear and one operator reads that: {obstacle}",
    )


def _readers_of_codes(graph: Graph, codes: str) -> int:
    """How many operators read codes, through DequantizeLinear: each gets a DequantizeLinear of its own."""
    readers = graph.consumers.get(codes, [])
    return sum(
        len(graph.consumers.get(reader.output[0], [])) if reader.op_type == "DequantizeLinear" else 1
        for reader in readers
    ) + (codes in graph.outputs)


def _weight(graph: Graph, node: onnx.NodeProto) -> Iterator[Reason]:
    index = weight_index(graph, node)
    found = find_weight(graph, node, index) if index is not None else None
    if index is None or found is None:
        return
    tensor, dequantize = found.constant.source, found.dequantize
    if dequantize is None:
        what = f"its weight {tensor} is {found.constant.value.dtype}, without a DequantizeLinear"
        yield Reason(kind="float-weight", what=what)
        return
    if found.constant.storage in ("int4", "int2", "uint4", "uint2") and dequantize.input[0] == tensor:
        yield Reason(
            kind="packed-weight",
            what=f"its weight {tensor} goes into DequantizeLinear as {found.constant.storage}; integer kernels take "
            "int8, which a Cast before it makes",
        )
    elif found.constant.value.dtype not in (np.int8, np.uint8):
        what = f"its weight {tensor} is stored as {found.constant.value.dtype}; integer kernels take 8 bits"
        yield Reason(kind="weight-type", what=what)
    if found.block:
        yield Reason(kind="weight-blocks", what=f"its weight {tensor} has a scale for every {found.block} values")
    if node.op_type != "Gemm":
        return
    attributes = attributes_of(node)
    if len(dequantize.input) < 3 or not dequantize.input[2]:
        what = f"the DequantizeLinear of its weight {tensor} has no zero point, which a Gemm needs even where it is 0"
        yield Reason(kind="weight-zero-point", what=what)
    changed = [f"{name} is {attributes[name]:g}" for name in ("alpha", "beta") if attributes.get(name, 1.0) != 1.0]
    if changed and len(node.input) > 2:
        yield Reason(kind="gemm-attributes", what=f"it has a bias, and {', '.join(changed)} instead of 1")
    outputs = 0 if attributes.get("transB", 0) else 1
    if found.axis is not None and not found.block and graph.producers.get(node.input[index]) is dequantize:
        axis = found.axis % found.constant.value.ndim
        if axis != outputs:
            what = f"the scales of its weight {tensor} lie along axis {axis}; its outputs are axis {outputs}"
            yield Reason(kind="weight-axis", what=what)


def _bias(graph: Graph, node: onnx.NodeProto) -> Iterator[Reason]:
    """A bias in float is quantised by onnxruntime itself; one that is int32 has to be in steps of its product."""
    index = OPERANDS[node.op_type].bias if node.op_type in OPERANDS else None
    if index is None or index >= len(node.input) or not node.input[index]:
        return
    dequantize = graph.producers.get(node.input[index])
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        if known(graph, node.input[index]) is None:
            yield Reason(
                kind="computed-bias",
                what=f"its bias {node.input[index]} is computed: {written_by(graph, node.input[index])}",
            )
        return
    stored = known(graph, dequantize.input[0])
    if stored is not None and stored.value.dtype != np.int32:
        what = f"its bias {dequantize.input[0]} is stored as {stored.value.dtype}; integer kernels take int32"
        yield Reason(kind="bias-type", what=what)
    weight, source = find_weight(graph, node, 1), graph.producers.get(node.input[0])
    if source is None or source.op_type != "DequantizeLinear" or weight is None or weight.scale is None or weight.block:
        return
    scale, input_scale = value(graph, dequantize.input, 1), value(graph, source.input, 1)
    if node.op_type != "Conv" or scale is None or input_scale is None or input_scale.size != 1:
        return  # a QGemm reads the integers alone
    expected = input_scale.astype(np.float64).reshape(-1) * weight.scale.astype(np.float64).reshape(-1)
    given = scale.astype(np.float64).reshape(-1)
    off = given.size > 1 and expected.size > 1 and given.size != expected.size
    if off or not np.allclose(given, expected, rtol=BIAS_TOLERANCE, atol=0):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = "" if off else f" (up to {np.max(np.maximum(given / expected, expected / given)):.3g} times off)"
        what = f"the scale of its bias {dequantize.input[0]} is not input scale times weight scale{ratio}"
        yield Reason(kind="bias-scale", what=what)


def _output(graph: Graph, node: onnx.NodeProto) -> Iterator[Reason]:
    """What a kernel writes has to go to one QuantizeLinear and nowhere else; a Gemm's result may stay float."""
    (tensor, *_) = node.output
    readers = graph.consumers.get(tensor, [])
    if len(readers) == 1 and tensor not in graph.outputs:
        (reader,) = readers
        if reader.op_type == "QuantizeLinear":
            yield from _codes(graph, reader.output[0], reader, "output")
            return
        quantize = quantized_by(graph, tensor)
        if quantize is not None and (reader.op_type in ACTIVATIONS or reader.op_type not in (*MOVING, "Identity")):
            yield _kept_activation(graph, reader, quantize)
            return
        following = graph.consumers.get(reader.output[0], [])
        if quantize is None and [item.op_type for item in following] == ["QuantizeLinear"]:
            what = f"{reader.op_type} {label(reader)} stands between it and its QuantizeLinear"
            yield Reason(kind="operator-before-quantize", what=what)
            return
    if node.op_type == "Gemm":
        return
    others = [f"{item.op_type} {label(item)}" for item in readers if item.op_type != "QuantizeLinear"]
    others += ["the graph's output"] if tensor in graph.outputs else []
    quantizers = len(readers) - len([item for item in readers if item.op_type != "QuantizeLinear"])
    if quantizers:
        others += [f"{quantizers} QuantizeLinear"]
        what = f"its float output {tensor} goes to {_list(others)}, where one QuantizeLinear has to be its only reader"
        yield Reason(kind="output-read-twice", what=what)
    else:
        yield Reason(kind="float-output", what=f"its output {tensor} is not quantised: it goes to {_list(others)}")


def _kept_activation(graph: Graph, activation: onnx.NodeProto, quantize: onnx.NodeProto) -> Reason:
    who = f"{activation.op_type} {label(activation)} stands between it and its QuantizeLinear"
    zero_point, scale = value(graph, quantize.input, 2), value(graph, quantize.input, 1)
    if zero_point is None or scale is None or zero_point.size != 1:
        return Reason(kind="activation-before-quantize", what=who)
    limits = np.iinfo(zero_point.dtype)
    low, high = ((end - int(zero_point.item())) * float(scale.item()) for end in (limits.min, limits.max))
    what = f"{who}, whose range {low:.3g} to {high:.3g} reaches beyond it, so that it cannot be dropped"
    return Reason(kind="activation-before-quantize", what=what)


def _dequantized_before(graph: Graph, tensor: str) -> onnx.NodeProto | None:
    """The DequantizeLinear from which a float tensor comes through what only reshapes."""
    node = graph.producers.get(tensor)
    while node is not None and node.op_type in (*RESHAPING, *MOVING):
        node = graph.producers.get(node.input[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _writer_is_float(graph: Graph, tensor: str) -> bool:
    """Whether an operator computes a tensor in float, seen through what only moves values."""
    node = graph.producers.get(tensor)
    while node is not None and node.op_type in (*RESHAPING, *MOVING, *ACTIVATIONS):
        node = graph.producers.get(node.input[0])
    return node is not None and node.op_type not in QUANTIZING


def _surroundings(graph: Graph, node: onnx.NodeProto) -> str:
    """DequantizeLinear, DequantizeLinear -> Conv -> QuantizeLinear."""
    before = [graph.producers[name].op_type if name in graph.producers else "constant" for name in node.input if name]
    after = [reader.op_type for name in node.output for reader in graph.consumers.get(name, [])]
    return f"{', '.join(before)} -> {node.op_type} -> {', '.join(after) or 'output'}"


def _list(parts: list[str], most: int = 3) -> str:
    shown = ", ".join(parts[:most])
    return shown if len(parts) <= most else f"{shown} and {len(parts) - most} more"
