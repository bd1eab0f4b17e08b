"""Exported models as data: who writes which tensor, and what the initialisers hold."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from mecdeploy.export import ExportConfig, export_model
from mecdeploy.export.graph import IntegerGraph


def exported(graph: IntegerGraph, **options: object) -> onnx.ModelProto:
    return onnx.load_from_string(export_model(graph, ExportConfig(**options), {}))  # type: ignore[arg-type]


def writers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in model.graph.node for output in node.output}


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
