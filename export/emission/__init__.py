"""Emission: an IntegerGraph that the passes have been over, as an ONNX model.

model.py         the ends of the graph, opset, metadata
operators.py     which function writes which node type: the pattern that onnxruntime fuses into an integer kernel
weighted.py      Conv and Gemm; weights.py, packed bits that fold to int8 at load
elementwise.py   Add, and one function per kind of Elementwise
pooling.py       means over windows; movement.py, what only moves codes
islands.py       pieces of float ONNX; barriers.py, where onnxruntime would compute something else
builder.py       nodes, initialisers, quantise and dequantise
"""

from mecdeploy.export.emission.model import emit

__all__ = ["emit"]
