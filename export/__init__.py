"""The export room: quantised units become an IntegerGraph, named passes rewrite it, emission writes ONNX."""
