"""From an IntegerGraph to the bytes of a checked ONNX file."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from mecdeploy.export.config import ExportConfig
from mecdeploy.export.emission import emit
from mecdeploy.export.errors import ExportError
from mecdeploy.export.graph import IntegerGraph
from mecdeploy.export.passes import run_passes


def compile_graph(graph: IntegerGraph, config: ExportConfig) -> IntegerGraph:
    """Run every pass of PASSES: the graph that `emit` writes. Raises ExportError."""
    return run_passes(graph, config)


def export_model(graph: IntegerGraph, config: ExportConfig, metadata: Mapping[str, str]) -> bytes:
    """Compile, emit and check: the bytes of an ONNX file.

    metadata: `mecdeploy.class_names` and `mecdeploy.checkpoint_sha256`, values as they go into metadata_props.
    Raises ExportError for a graph or a width that cannot be exported, and when onnx refuses the result.
    """
    data = emit(compile_graph(graph, config), config, metadata).SerializeToString()
    try:
        # on the bytes: a ModelProto would be serialised once more by each
        onnx.checker.check_model(data, full_check=True)
        onnx.shape_inference.infer_shapes(data, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{graph.name}: onnx refuses the exported model: {error}") from error
    return bytes(data)
