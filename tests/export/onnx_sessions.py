"""Running exported bytes in onnxruntime, one thread, and asking which kernels it chose."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime


def metadata_of(data: bytes) -> dict[str, str]:
    return {prop.key: prop.value for prop in onnx.load_from_string(data).metadata_props}


def expose_units(data: bytes) -> bytes:
    """The same model with every unit's integers among its outputs; this disturbs no fusion."""
    model = onnx.load_from_string(data)
    quantized = json.loads(metadata_of(data)["mecdeploy.activation_bits"])
    for name in json.loads(metadata_of(data)["mecdeploy.units"]):
        element = onnx.TensorProto.UINT8 if name in quantized else onnx.TensorProto.FLOAT
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, element, None))
    return model.SerializeToString()


def run(data: bytes, images: np.ndarray, **settings: str) -> dict[str, np.ndarray]:
    """Every output of the model by name. settings: session configuration entries, their dots as underscores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in settings.items():
        options.add_session_config_entry(key.replace("_", "."), value)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    results = session.run(None, {session.get_inputs()[0].name: images})
    return {output.name: result for output, result in zip(session.get_outputs(), results, strict=True)}


def optimized(data: bytes, folder: Path) -> onnx.GraphProto:
    """The graph onnxruntime really runs, at its default optimisation level."""
    path = folder / "optimized.onnx"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    # it warns that a saved graph of this level suits only this machine; this one goes nowhere
    options.log_severity_level = 3
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return onnx.load(path).graph


@dataclass(frozen=True)
class Kernel:
    op_type: str
    input_types: list[str]
    output_types: list[str]


def profile(data: bytes, images: np.ndarray, folder: Path) -> list[Kernel]:
    """The kernels that one run executed, in order, with the element types they read and wrote."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    session.run(None, {session.get_inputs()[0].name: images})
    events = json.loads(Path(session.end_profiling()).read_text())
    return [
        Kernel(
            event["args"]["op_name"],
            [kind for entry in event["args"]["input_type_shape"] for kind in entry],
            [kind for entry in event["args"]["output_type_shape"] for kind in entry],
        )
        for event in events
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time")
    ]


def kernels(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)
