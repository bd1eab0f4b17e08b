"""Which of onnxruntime's kernels compute in integers, which in float, and which only move values."""

from __future__ import annotations

import onnx

INTEGER_PRODUCTS = ("QLinearConv", "QGemm", "QLinearMatMul")
MIXED_PRODUCTS = ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
"""They multiply integers, and scale in float around it."""

FLOAT_PRODUCTS = (
    "Conv",  # of onnxruntime's nchwc domain too
    "FusedConv",
    "NhwcFusedConv",
    "ConvTranspose",
    "Gemm",
    "FusedGemm",
    "MatMul",
    "FusedMatMul",
    "MatMulNBits",
    *MIXED_PRODUCTS,
)
NOT_FLOAT = frozenset(
    {
        *INTEGER_PRODUCTS, "QuantizeLinear", "DequantizeLinear", "MaxPool", "NhwcMaxPool", "Clip", "Flatten", "Reshape",
        "Transpose", "Slice", "Split", "Concat", "Squeeze", "Unsqueeze", "Gather", "Expand", "Tile", "Cast", "Identity",
        "Shape", "Constant", "ReorderInput", "ReorderOutput",
    }
)  # fmt: skip
"""Integer kernels, and what only moves or selects values; QLinear kernels go by their prefix."""


def is_float(node: onnx.NodeProto) -> bool:
    """Whether a node of the optimised graph neither computes in integers nor only moves values."""
    copies = node.op_type == "Sum" and len(node.input) == 1
    return node.op_type not in NOT_FLOAT and not node.op_type.startswith("QLinear") and not copies
