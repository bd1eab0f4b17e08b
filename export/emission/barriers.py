"""Which outputs of a float island onnxruntime would compute as something else, and the barrier that keeps it from it.

Measured with onnxruntime 1.32, on what stands between a DequantizeLinear and a QuantizeLinear:

* A Conv, ConvTranspose or Gemm with float weights has them rounded to int8 (WeightBiasQuantization); MatMul + Add of
  constants becomes a Gemm first. 25-40% of the codes behind it were off, by up to 17.
* Where nothing is computed (Cast, Dropout, x + 0, x * 1, two Transposes that undo each other) the two quantisations are
  merged into one; codes behind were off by up to 6, and differently once a value was made a graph output.
* Softmax, pooling and Resize run on the codes, rounding as their integer kernels do and not as float operators do.

Movement, activations and constants added or multiplied on the way change nothing of that. A Sum of one input does: it
is a copy, and no rewrite looks through it.
"""

from __future__ import annotations

from types import MappingProxyType

from onnx import GraphProto, NodeProto

BARRIER = "Sum"
REWRITTEN = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "Softmax", "AveragePool", "GlobalAveragePool", "Resize", "Upsample", "Where"}
)
SEEN_THROUGH = frozenset(
    {
        "Identity", "Dropout", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split",
        "Gather", "Concat", "Expand", "Tile", "Pad", "DepthToSpace", "SpaceToDepth", "MaxPool", "Relu", "Clip",
        "LeakyRelu", "BatchNormalization", "Add", "Sub", "Mul", "Div", "MatMul",
    }
)  # fmt: skip
MIXERS = frozenset({"Add", "Sub", "Mul", "Div", "MatMul"})
"""Seen through only where all but one of their inputs are constants."""

Writers = MappingProxyType[str, NodeProto]


def needs_barrier(graph: GraphProto, output: str) -> bool:
    """Whether a rewrite of onnxruntime could reach from a QuantizeLinear behind `output` to what comes before it."""
    writers = MappingProxyType({name: node for node in graph.node for name in node.output})
    inputs = {entry.name for entry in graph.input}
    pending, seen = [output], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        node = writers.get(name)
        if name in inputs or (node is not None and node.op_type in REWRITTEN):
            return True
        if node is not None and node.op_type in SEEN_THROUGH:
            computed = [one for one in node.input if one in inputs or _is_computed(one, writers)]
            if node.op_type not in MIXERS or len(computed) < 2:
                pending.extend(computed)
    return False


def _is_computed(name: str, writers: Writers) -> bool:
    """Whether a tensor is made by a node, a Constant excepted."""
    return name in writers and writers[name].op_type != "Constant"
