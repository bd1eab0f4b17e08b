"""What ours is compared with: the fp32 network as ONNX, and onnxruntime's own static int8 of that file."""

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
from torch import nn

from mecdeploy.float_baseline import INPUT, float_onnx

_IMAGE_AXES = ({2, 3}, {-1, -2})


def write_float(model: nn.Module, side: int, path: Path) -> None:
    """The fp32 network as torch.onnx writes it: float input [N, 3, side, side], float logits [N, classes]."""
    proto = onnx.load_from_string(float_onnx(model.eval(), channels=3, height=side, width=side))
    name_global_pools(proto.graph)
    path.write_bytes(proto.SerializeToString())


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
    del graph.node[:]
    graph.node.extend(nodes)


class _Images(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: NDArray[np.float32]) -> None:
        self._feeds: Iterator[dict[str, NDArray[np.float32]]] = iter([{INPUT: image[None]} for image in images])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._feeds, None)


def write_static_int8(float_model: Path, images: NDArray[np.float32], path: Path) -> None:
    """Quantise as onnxruntime's guide for x86 says: QDQ, uint8 activations, int8 weights per channel (U8S8), min-max.

    images: normalised float32 [n, C, H, W], for calibration.
    """
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
            _Images(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        logging.getLogger().setLevel(level)
        prepared.unlink(missing_ok=True)
