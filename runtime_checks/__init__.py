"""The runtime checks: an independent witness of what onnxruntime computes."""
