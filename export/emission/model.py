"""A compiled IntegerGraph as an ONNX model: its ends, its opset and its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, helper

from mecdeploy import __version__
from mecdeploy.export.config import ExportConfig
from mecdeploy.export.emission.builder import FLOAT, UINT8, GraphBuilder
from mecdeploy.export.emission.operators import EMITTERS
from mecdeploy.export.graph import Conv, FloatIsland, Gemm, IntegerGraph, Quantize, outputs_of

FORMAT = "1"
"""Version of what the metadata and the tensor names promise."""

OPSET, IR_VERSION = 21, 10
"""The oldest opset with INT4. onnxruntime 1.18 reads it; onnx's own newest may be newer than any runtime."""

INT2_OPSET, INT2_IR_VERSION = 25, 13
"""The oldest opset with INT2."""

IMAGE = "image"
"""The float input, pixels / 255; a uint8 input is the graph's own pixels."""


def emit(graph: IntegerGraph, config: ExportConfig, metadata: Mapping[str, str]) -> ModelProto:
    """Write a graph that `run_passes` has been over.

    metadata: further metadata_props, under their full keys (`mecdeploy.class_names`, `mecdeploy.checkpoint_sha256`).
    """
    proto = _emit_graph(graph, config)
    has_int2 = any(tensor.data_type == TensorProto.INT2 for tensor in proto.initializer)
    model = ModelProto(
        ir_version=INT2_IR_VERSION if has_int2 else IR_VERSION,
        producer_name="mecdeploy",
        producer_version=__version__,
        opset_import=[helper.make_opsetid("", INT2_OPSET if has_int2 else OPSET)],
        graph=proto,
    )
    helper.set_model_props(model, {**metadata, **_describe(graph, config)})
    return model


def _emit_graph(graph: IntegerGraph, config: ExportConfig) -> GraphProto:
    builder = GraphBuilder(graph)
    pixels = graph.values[graph.input]
    if config.input == "float":
        image = builder.input(IMAGE, FLOAT, pixels.shape)
        scale = builder.shared(f"{IMAGE}/scale", np.array(np.float32(1) / np.float32(255)))
        zero_point = builder.shared(f"{IMAGE}/zero_point", np.array(0, np.uint8))
        builder.node("QuantizeLinear", [image, scale, zero_point], pixels.name)
    else:
        builder.input(pixels.name, UINT8, pixels.shape)
    for node in graph.nodes:
        EMITTERS[type(node)](builder, node)
    builder.output(graph.output, FLOAT, graph.values[graph.output].shape)
    return builder.proto()


def _describe(graph: IntegerGraph, config: ExportConfig) -> dict[str, str]:
    """The metadata that the graph and the config determine."""
    weights = {node.name: node.weight for node in graph.nodes if isinstance(node, Conv | Gemm)}
    units = _units(graph)
    quantizations = {name: graph.values[name].quantization for name in units}
    described: dict[str, Any] = {
        "weight_bits": {name: weight.packed_bits for name, weight in weights.items()},
        "trained_bits": {name: weight.bits for name, weight in weights.items()},
        "activation_bits": {name: one.bits for name, one in quantizations.items() if one is not None},
        "units": units,
        "input": _describe_input(graph, config),
        **_describe_islands(graph),
    }
    props = {f"mecdeploy.{key}": json.dumps(value) for key, value in described.items()}
    return {"mecdeploy.format": FORMAT, "mecdeploy.target": config.target, **props}


def _units(graph: IntegerGraph) -> list[str]:
    """The values that kernels write, in execution order: all codes, and the floats of Gemms before FloatIslands."""
    return [
        name
        for node in graph.nodes
        for name in outputs_of(node)
        if name != graph.output and (isinstance(node, Gemm) or graph.values[name].quantization is not None)
    ]


def _describe_islands(graph: IntegerGraph) -> dict[str, object]:
    """What a file with FloatIslands says of them; nothing for a file without."""
    islands = [node for node in graph.nodes if isinstance(node, FloatIsland)]
    if not islands:
        return {}
    return {
        "float_values": [node.output for node in graph.nodes if isinstance(node, Quantize)],
        "islands": {node.name: {"operators": list(node.operators), "reason": node.reason} for node in islands},
    }


def _describe_input(graph: IntegerGraph, config: ExportConfig) -> dict[str, object]:
    channels, height, width = graph.values[graph.input].shape
    return {
        "dtype": "float32" if config.input == "float" else "uint8",
        "layout": "NCHW",
        "channels": channels,
        "height": height,
        "width": width,
        "range": [0, 1] if config.input == "float" else [0, 255],
        "color": "L" if channels == 1 else "RGB",
    }
