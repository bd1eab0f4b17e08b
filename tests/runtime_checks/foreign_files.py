"""A float network as another tool would write it, and what onnxruntime's own quantiser makes of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from one_fault import Sketch
from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static

SHAPE = (4, 8, 8)
LAYERS = ("stem", "conv1", "conv2", "head", "fc")
PARAMETERS = (8 * 4 * 9 + 8) + 2 * (8 * 8 * 9 + 8) + (8 * 8 + 8) + 8 * 10


def float_network() -> onnx.ModelProto:
    """A stem, a residual block, a sigmoid, a pool and a MatMul; nodes are called node_<layer>."""
    sketch, rng = Sketch(), np.random.default_rng(0)

    def conv(name: str, x: str, inputs: int, kernel: int) -> str:
        weight = sketch.constant(
            f"{name}_w", rng.normal(0, 1 / np.sqrt(inputs * kernel**2), (8, inputs, kernel, kernel))
        )
        bias = sketch.constant(f"{name}_b", rng.normal(0, 0.1, 8))
        return sketch.op("Conv", [x, weight, bias], name, pads=[kernel // 2] * 4)

    stem = sketch.op("Relu", [conv("stem", "x", 4, 3)], "relu")
    inner = sketch.op("Relu", [conv("conv1", stem, 8, 3)], "relu1")
    block = sketch.op("Relu", [sketch.op("Add", [conv("conv2", inner, 8, 3), stem], "sum")], "relu2")
    head = sketch.op("Sigmoid", [conv("head", block, 8, 1)], "gate")
    flat = sketch.op("Flatten", [sketch.op("GlobalAveragePool", [head], "pool")], "flat")
    sketch.op("MatMul", [flat, sketch.constant("fc_w", rng.normal(size=(8, 10)))], "fc")
    model = sketch.finish("fc", shape=SHAPE)
    model.producer_name, model.producer_version = "elsewhere", "1.2"
    return model


class Noise(CalibrationDataReader):
    """Four batches."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.batches: Iterator[dict[str, Any]] = iter(
            [{"x": rng.normal(size=(2, *SHAPE)).astype(np.float32)} for _ in range(4)]
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def quantized(source: Path, to: Path, **options: Any) -> Path:
    """Through onnxruntime.quantization; dynamic without options. It logs advice that no test asked for."""
    logging.disable(logging.WARNING)
    try:
        if options:
            quantize_static(str(source), str(to), Noise(), **options)
        else:
            quantize_dynamic(str(source), str(to))
    finally:
        logging.disable(logging.NOTSET)
    return to
