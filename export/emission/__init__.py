"""Emission: an IntegerGraph that the passes have been over, as an ONNX model.

model.py       the ends of the graph, opset, metadata
operators.py   one function per node type: the pattern that onnxruntime fuses into an integer kernel
weights.py     one function per weight storage: packed bits that fold to int8 at load
builder.py     nodes, initialisers, quantise and dequantise
"""

from mecdeploy.export.emission.model import emit

__all__ = ["emit"]
