"""An integer interpreter: from the ONNX file alone to every integer that onnxruntime's fused kernels compute.

It matches DequantizeLinear -> op -> QuantizeLinear (-> Clip) in the file's order and computes each with the arithmetic
of arithmetic.py. A node it has no arithmetic for is an error by name, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mecdeploy.runtime_checks import arithmetic, kernels
from mecdeploy.runtime_checks.errors import CheckError
from mecdeploy.runtime_checks.model_file import ModelFile, ModelSource, read_model
from mecdeploy.runtime_checks.patterns import Graph, Product, Quantized, attributes_of, fault

Array = NDArray[Any]

_FLOAT_OPS = ("Conv", "Gemm", "Add", "GlobalAveragePool", "AveragePool", "MaxPool", "Flatten", "Reshape")
_INTEGER_OPS = ("Clip", "MaxPool", "Flatten", "Reshape")


@dataclass(frozen=True)
class Step:
    """One kernel: reads stored integers by tensor name, writes one tensor."""

    output: str
    inputs: tuple[str, ...]
    compute: Callable[..., Array]


class Interpreter:
    """A planned model; `run` may be called for any number of batches."""

    def __init__(self, file: ModelFile) -> None:
        """Match every node of the graph; CheckError names the first that no integer kernel covers."""
        self._file = file
        self._graph = Graph(file.proto.graph)
        self._integers = {file.input_name} if file.input_dtype == "uint8" else set()
        self._float_inputs = {file.input_name} - self._integers
        self._steps = self._plan()

    def run(self, pixels: NDArray[np.uint8], *, outputs: Collection[str] | None = None) -> dict[str, Array]:
        """Stored uint8 codes of every integer tensor, and the float32 logits, for raw pixels [n, C, H, W].

        outputs: tensors to return; the others are dropped as soon as nothing reads them. None returns all.
        """
        values: dict[str, Array] = dict(self._file.feed(pixels))
        last_use = {name: index for index, step in enumerate(self._steps) for name in step.inputs}
        for index, step in enumerate(self._steps):
            try:
                values[step.output] = step.compute(*(values[name] for name in step.inputs))
            except ValueError as error:
                raise CheckError(f"{step.output!r}: shapes do not fit ({error}). Export the run again.") from None
            if outputs is not None:
                for name in step.inputs:
                    if last_use[name] == index and name not in outputs:
                        values.pop(name, None)
        wanted = values if outputs is None else {name: values[name] for name in outputs if name in values}
        return {name: value for name, value in wanted.items() if name not in self._float_inputs}

    def _plan(self) -> list[Step]:
        steps = []
        for node in self._graph.proto.node:
            step = self._match(node)
            if step is not None:
                steps.append(step)
                if step.output not in self._graph.outputs:
                    self._integers.add(step.output)
        return steps

    def _match(self, node: onnx.NodeProto) -> Step | None:
        graph = self._graph
        if node.op_type == "DequantizeLinear" or all(graph.constants.get(name) is not None for name in node.output):
            return None  # read by the patterns of its consumers
        if node.op_type == "QuantizeLinear":
            return self._match_quantize(node)
        if node.op_type in _INTEGER_OPS and node.input[0] in self._integers:
            return Step(node.output[0], (node.input[0],), _on_integers(graph, node))
        if node.op_type not in _FLOAT_OPS:
            raise fault(node, "the integer interpreter has no arithmetic for it")
        if node.op_type == "Gemm" and node.output[0] in graph.outputs:
            product = graph.product(node)
            return Step(node.output[0], (product.input.tensor,), _gemm_to_real(product))
        graph.quantized(node)  # refuses an output that stays float
        return None

    def _match_quantize(self, node: onnx.NodeProto) -> Step:
        graph = self._graph
        target = graph.quantization(node, node.output[0])
        source = node.input[0]
        if source in self._float_inputs:
            quantize = partial(arithmetic.quantize, scale=target.scale, zero_point=target.zero_point)
            return Step(target.tensor, (source,), quantize)
        producer = graph.producers.get(source)
        if producer is None or producer.op_type not in _FLOAT_OPS:
            raise fault(node, f"it quantises {source!r}, which no integer kernel computes")
        if producer.op_type in ("Conv", "Gemm"):
            product = graph.product(producer)
            return Step(target.tensor, (product.input.tensor,), _product(product, target))
        if producer.op_type == "Add":
            a, b = graph.dequantized(producer, 0), graph.dequantized(producer, 1)
            return Step(target.tensor, (a.tensor, b.tensor), _add(a, b, target))
        x = graph.dequantized(producer, 0)
        if producer.op_type in ("GlobalAveragePool", "AveragePool"):
            return Step(target.tensor, (x.tensor,), _average(producer, x, target))
        if (x.scale, x.zero_point) != (target.scale, target.zero_point):
            raise fault(producer, "its input and output scales differ, so it runs in float")
        return Step(target.tensor, (x.tensor,), _on_integers(graph, producer))


def interpret(model: ModelSource, pixels: NDArray[np.uint8]) -> dict[str, Array]:
    """Every integer tensor of a mecdeploy ONNX file, and its logits, for raw pixels [n, C, H, W]."""
    return Interpreter(read_model(model)).run(pixels)


def _accumulator(product: Product) -> Callable[[Array], Array]:
    zero_point, weight, bias = product.input.zero_point, product.weight, product.bias
    if product.node.op_type == "Gemm":
        return lambda x: kernels.matrix_product(x, zero_point, weight, bias)
    attributes = attributes_of(product.node)
    window = _window(product.node, (weight.shape[2], weight.shape[3]))
    groups = int(attributes.get("group", 1))
    return lambda x: kernels.convolve(x, zero_point, weight, bias, window, groups)


def _product(product: Product, target: Quantized) -> Callable[[Array], Array]:
    accumulate = _accumulator(product)
    multiplier = arithmetic.output_multiplier(product.input.scale, product.weight_scale, target.scale)
    return lambda x: arithmetic.requantize(accumulate(x), multiplier, target.zero_point)


def _gemm_to_real(product: Product) -> Callable[[Array], Array]:
    """The logits: f32(acc) * f32(s_x * s_w)."""
    accumulate = _accumulator(product)
    multiplier = product.input.scale * product.weight_scale
    return lambda x: accumulate(x).astype(np.float32) * multiplier


def _add(a: Quantized, b: Quantized, target: Quantized) -> Callable[[Array, Array], Array]:
    table = arithmetic.addition_table(
        a.scale, a.zero_point, b.scale, b.zero_point, target.scale, target.zero_point
    ).reshape(-1)

    def compute(x: Array, y: Array) -> Array:
        if x.shape != y.shape:
            raise ValueError(f"{list(x.shape)} + {list(y.shape)}")
        return np.take(table, (x.astype(np.uint16) << 8) | y)

    return compute


def _average(node: onnx.NodeProto, x: Quantized, target: Quantized) -> Callable[[Array], Array]:
    def whole(codes: Array) -> Array:
        multiplier = arithmetic.global_average_multiplier(x.scale, target.scale, math.prod(codes.shape[2:]))
        total = kernels.global_sum(codes, x.zero_point)
        return arithmetic.requantize(total, multiplier.reshape(1), target.zero_point)

    if node.op_type == "GlobalAveragePool":
        return whole
    window = _window(node)
    include_pad = bool(attributes_of(node).get("count_include_pad", 0))
    if window.ceil_mode:
        raise fault(node, "the integer interpreter has no arithmetic for ceil_mode")

    def windowed(codes: Array) -> Array:
        if codes.shape[2:] == window.kernel and not any(window.pads):
            return whole(codes)  # onnxruntime takes its global kernel here
        return kernels.average_pool(codes, x.scale, x.zero_point, window, include_pad, target.scale, target.zero_point)

    return windowed


def _on_integers(graph: Graph, node: onnx.NodeProto) -> Callable[[Array], Array]:
    """Ops that move or compare stored codes without touching their scale."""
    if node.op_type == "Clip":
        low, high = _limit(graph, node, 1, 0), _limit(graph, node, 2, 255)
        return lambda codes: np.clip(codes, low, high)
    if node.op_type == "MaxPool":
        window = _window(node)
        return lambda codes: kernels.max_pool(codes, window)
    if node.op_type == "Flatten":
        axis = int(attributes_of(node).get("axis", 1))
        return lambda codes: codes.reshape(math.prod(codes.shape[:axis]), -1)
    sizes = graph.constant(node, 1).tolist()
    return lambda codes: codes.reshape([codes.shape[i] if size == 0 else size for i, size in enumerate(sizes)])


def _limit(graph: Graph, node: onnx.NodeProto, index: int, default: int) -> int:
    given = index < len(node.input) and node.input[index]
    return int(graph.constant(node, index).item()) if given else default


def _window(node: onnx.NodeProto, kernel: tuple[int, int] | None = None) -> kernels.Window:
    attributes = attributes_of(node)
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b""):
        raise fault(node, "auto_pad is set; the pads must be written out")
    shape = kernel if kernel is not None else attributes["kernel_shape"]
    pads = attributes.get("pads", [0, 0, 0, 0])
    strides = attributes.get("strides", [1, 1])
    dilations = attributes.get("dilations", [1, 1])
    if len(shape) != 2 or len(pads) != 4:
        raise fault(node, "only two-dimensional windows are known")
    return kernels.Window(
        kernel=(int(shape[0]), int(shape[1])),
        strides=(int(strides[0]), int(strides[1])),
        pads=(int(pads[0]), int(pads[1]), int(pads[2]), int(pads[3])),
        dilations=(int(dilations[0]), int(dilations[1])),
        ceil_mode=bool(attributes.get("ceil_mode", 0)),
    )
