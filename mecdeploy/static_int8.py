"""onnxruntime's own static int8 of a float file: what a quantised network's time is compared with."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

_IMAGE_AXES = ({2, 3}, {-1, -2})


def name_global_pools(graph: onnx.GraphProto) -> None:
    """Turn ReduceMean over height and width, in place, into the GlobalAveragePool that it is.

    quantize_static leaves a ReduceMean in float: the int8 baseline would be the slower for it.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        axes = constants.get(node.input[1]) if node.op_type == "ReduceMean" and len(node.input) > 1 else None
        keeps = next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
        if axes is None or not keeps or set(numpy_helper.to_array(axes).tolist()) not in _IMAGE_AXES:
            nodes.append(node)
        else:
            nodes.append(helper.make_node("GlobalAveragePool", node.input[:1], node.output, node.name))
    read = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]  # onnxruntime warns of the axes left over
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)


class _Images(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, images: NDArray[np.float32]) -> None:
        self._feeds: Iterator[dict[str, NDArray[np.float32]]] = iter([{name: image[None]} for image in images])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._feeds, None)


def write_static_int8(
    float_model: Path, images: NDArray[np.float32], path: Path, *, weights: QuantType = QuantType.QInt8
) -> None:
    """Quantise as onnxruntime's guide for x86 says: QDQ, uint8 activations, int8 weights per channel (U8S8), min-max.

    float_model: with one input. images: normalised float32 [n, C, H, W], for calibration. weights: QInt4 packs them.
    """
    (source,) = onnx.load(float_model, load_external_data=False).graph.input
    prepared = path.with_suffix(".prepared.onnx")
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it recommends the pre-processing that was just done
    try:
        try:
            quant_pre_process(str(float_model), str(prepared))
        except TypeError:  # its symbolic shape inference stumbles over Swin V2's Expand; ONNX's own does not
            quant_pre_process(str(float_model), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(path),
            _Images(source.name, images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=weights,
        )
    finally:
        logging.getLogger().setLevel(level)
        prepared.unlink(missing_ok=True)
