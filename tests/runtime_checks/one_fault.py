"""Small quantised graphs with one fault each, and the same without it: what makes onnxruntime leave its integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SCALE, WEIGHT_SCALE = 0.05, 0.02
Model = Callable[[], onnx.ModelProto]


@dataclass
class Sketch:
    """Nodes and constants of a graph. Every tensor is named by who makes it; nodes are called node_<tensor>."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def packed(self, name: str, kind: int, shape: tuple[int, ...], size: int) -> str:
        data = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8).tobytes()
        self.constants[name] = helper.make_tensor(name, kind, shape, data, raw=True)
        return name

    def op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def quantize(self, real: str, name: str, dtype: Any = np.uint8, zero_point: int = 128, scale: Any = SCALE) -> str:
        parameters = [self.constant(f"{name}_scale", scale), self.constant(f"{name}_zero", zero_point, dtype)]
        return self.op("QuantizeLinear", [real, *parameters], name)

    def dequantize(self, codes: str, like: str, name: str) -> str:
        return self.op("DequantizeLinear", [codes, f"{like}_scale", f"{like}_zero"], name)

    def weight(
        self, shape: tuple[int, ...], *, axis: int = 0, dtype: Any = np.int8, zero_point: bool = True, name: str = "w"
    ) -> str:
        """int8 values of 4 bits, a scale for each entry along the axis."""
        self.constant(f"{name}_q", np.random.default_rng(1).integers(-7, 8, shape), dtype)
        inputs = [f"{name}_q", self.constant(f"{name}_scale", np.full(shape[axis], WEIGHT_SCALE))]
        if zero_point:
            inputs.append(self.constant(f"{name}_zero", np.zeros(shape[axis]), dtype))
        return self.op("DequantizeLinear", inputs, f"{name}_real", axis=axis)

    def bias(self, count: int, scale: float = SCALE * WEIGHT_SCALE, dtype: Any = np.int32) -> str:
        self.constant("b_q", np.arange(count), dtype)
        self.constant("b_scale", np.full(count, scale))
        return self.op("DequantizeLinear", ["b_q", "b_scale"], "b_real", axis=0)

    def finish(
        self, *outputs: str, shape: tuple[int, ...] = (4, 8, 8), dtype: int = TensorProto.FLOAT
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "sketch",
            [helper.make_tensor_value_info("x", dtype, ["N", *shape])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            list(self.constants.values()),
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def convolution(
    *,
    quantize_input: bool = True,
    pixels: Any = None,
    dtype: Any = np.uint8,
    zero_point: int = 128,
    clip_codes: bool = False,
    before: Callable[[Sketch, str], str] | None = None,
    weight: Callable[[Sketch], str] = lambda sketch: sketch.weight((4, 4, 3, 3)),
    bias: Callable[[Sketch], str] | None = lambda sketch: sketch.bias(4),
    after: Callable[[Sketch, str], str] | None = None,
    output_zero_point: int = 128,
    quantize_output: bool = True,
    read_twice: bool = False,
) -> onnx.ModelProto:
    """x -> Q -> DQ -> Conv -> Q -> DQ -> y, and what the arguments change."""
    sketch, real = Sketch(), "x"
    if pixels is not None:
        sketch.constant("pixels_scale", SCALE)
        sketch.constant("pixels_zero", 0, pixels)
        real = sketch.dequantize("x", "pixels", "xd")
    elif quantize_input:
        codes = sketch.quantize("x", "xq", dtype, zero_point)
        if clip_codes:
            limits = [sketch.constant("low", 0, dtype), sketch.constant("high", 7, dtype)]
            codes = sketch.op("Clip", ["xq", *limits], "clipped")
        real = sketch.dequantize(codes, "xq", "xd")
    if before is not None:
        real = before(sketch, real)
    operands = [real, weight(sketch), *([bias(sketch)] if bias is not None else [])]
    result = sketch.op("Conv", operands, "conv", pads=[1, 1, 1, 1])
    outputs = ["y"]
    if after is not None:
        result = after(sketch, result)
    if read_twice:
        outputs.append(sketch.op("Abs", [result], "z"))
    if quantize_output:
        sketch.quantize(result, "yq", np.uint8, output_zero_point)
        result = sketch.dequantize("yq", "yq", "yd")
    sketch.op("Identity", [result], "y")
    kinds = {None: TensorProto.FLOAT, np.int8: TensorProto.INT8, np.uint8: TensorProto.UINT8}
    return sketch.finish(*outputs, dtype=kinds[pixels])


def gemm(
    *,
    weight: Callable[[Sketch], str] = lambda sketch: sketch.weight((4, 8)),
    before: Callable[[Sketch, str], str] | None = None,
    bias: bool = False,
    bias_scale: float = 1,
    **attributes: Any,
) -> onnx.ModelProto:
    """x -> Q -> DQ -> Gemm -> y in float: a product of integers all the same."""
    sketch = Sketch()
    sketch.quantize("x", "xq")
    real = sketch.dequantize("xq", "xq", "xd")
    if before is not None:
        real = before(sketch, real)
    inputs = [real, weight(sketch), *([sketch.bias(4, bias_scale * SCALE * WEIGHT_SCALE)] if bias else [])]
    sketch.op("Gemm", inputs, "y", transB=1, **attributes)
    return sketch.finish("y", shape=(8,))


def operator(
    kind: str,
    *,
    inputs: int = 1,
    constant: bool = False,
    dtype: Any = np.uint8,
    shared: bool = False,
    **attributes: Any,
) -> onnx.ModelProto:
    """x -> Q -> DQ -> an operator of one or two such inputs -> Q -> DQ -> y."""
    zero_point = 128 if dtype == np.uint8 else 0
    sketch, operands = Sketch(), []
    for index in range(inputs):
        codes = "q0" if shared else f"q{index}"
        if codes == f"q{index}":
            sketch.quantize("x", codes, dtype, zero_point, SCALE * (1 + index))
        operands.append(sketch.dequantize(codes, codes, f"d{index}"))
    if constant:
        operands.append(sketch.constant("one", np.ones((4, 1, 1))))
    sketch.op(kind, operands, "r", **attributes)
    sketch.quantize("r", "yq", dtype, zero_point)
    sketch.op("Identity", [sketch.dequantize("yq", "yq", "yd")], "y")
    return sketch.finish("y")


def float_weight(sketch: Sketch) -> str:
    return sketch.constant("w", np.random.default_rng(1).normal(size=(4, 4, 3, 3)))


def packed_weight(*, cast: bool) -> Callable[[Sketch], str]:
    def make(sketch: Sketch) -> str:
        codes = sketch.packed("w_q", TensorProto.INT4, (4, 4, 3, 3), 72)
        sketch.constant("w_scale", np.full(4, WEIGHT_SCALE))
        if cast:
            zero = sketch.constant("w_zero", np.zeros(4), np.int8)
            codes = sketch.op("Cast", [codes], "w_cast", to=TensorProto.INT8)
        else:
            zero = sketch.packed("w_zero", TensorProto.INT4, (4,), 2)
        return sketch.op("DequantizeLinear", [codes, "w_scale", zero], "w_real", axis=0)

    return make


def block_weight(sketch: Sketch) -> str:
    sketch.constant("w_q", np.random.default_rng(1).integers(-7, 8, (4, 4, 3, 3)), np.int8)
    sketch.constant("w_scale", np.full((4, 2, 3, 3), WEIGHT_SCALE))
    sketch.constant("w_zero", np.zeros((4, 2, 3, 3)), np.int8)
    return sketch.op("DequantizeLinear", ["w_q", "w_scale", "w_zero"], "w_real", axis=1, block_size=2)


def computed_bias(sketch: Sketch) -> str:
    sketch.op("ReduceMean", ["x", sketch.constant("axes", [0, 2, 3], np.int64)], "mean", keepdims=0)
    return "mean"


def between(kind: str, **attributes: Any) -> Callable[[Sketch, str], str]:
    def make(sketch: Sketch, real: str) -> str:
        return sketch.op(kind, [real], f"between_{kind}", **attributes)

    return make


def reshaped(sketch: Sketch, real: str) -> str:
    return sketch.op("Reshape", [real, sketch.constant("shape", [0, 8], np.int64)], "reshaped")


def clipped(low: float, high: float) -> Callable[[Sketch, str], str]:
    def make(sketch: Sketch, real: str) -> str:
        return sketch.op("Clip", [real, sketch.constant("low", low), sketch.constant("high", high)], "kept")

    return make


# kind, and a name where it has several: with the fault, without it
FAULTS: dict[str, tuple[Model, Model]] = {
    "graph-input": (lambda: convolution(quantize_input=False), convolution),
    "float-input": (lambda: convolution(before=between("Neg")), convolution),
    "float-weight": (lambda: convolution(weight=float_weight), convolution),
    "packed-weight": (
        lambda: convolution(weight=packed_weight(cast=False)),
        lambda: convolution(weight=packed_weight(cast=True)),
    ),
    "weight-type": (lambda: convolution(weight=lambda s: s.weight((4, 4, 3, 3), dtype=np.int16)), convolution),
    "weight-blocks": (lambda: convolution(weight=block_weight), convolution),
    "bias-scale": (
        lambda: convolution(bias=lambda s: s.bias(4, 2 * SCALE * WEIGHT_SCALE)),
        lambda: convolution(bias=lambda s: s.bias(4, 1.005 * SCALE * WEIGHT_SCALE)),
    ),
    "bias-type": (lambda: convolution(bias=lambda s: s.bias(4, dtype=np.int16)), convolution),
    "computed-bias": (lambda: convolution(bias=computed_bias), convolution),
    "float-output": (lambda: convolution(quantize_output=False), convolution),
    "output-read-twice": (lambda: convolution(read_twice=True), convolution),
    "activation-before-quantize:Relu": (
        lambda: convolution(after=between("Relu")),
        lambda: convolution(after=between("Relu"), output_zero_point=0),
    ),
    "activation-before-quantize:Clip": (
        lambda: convolution(after=clipped(-0.5, 0.5)),
        lambda: convolution(after=clipped(-7, 7)),
    ),
    "operator-before-quantize": (lambda: convolution(after=between("LeakyRelu")), convolution),
    "operator-before-quantize:Flatten": (
        lambda: convolution(after=between("Flatten")),
        lambda: convolution(after=between("Transpose", perm=[0, 3, 1, 2])),
    ),
    "signed-activation:Clip": (
        lambda: convolution(dtype=np.int8, zero_point=0, clip_codes=True),
        lambda: convolution(dtype=np.int8, zero_point=0),
    ),
    "signed-activation:readers": (
        lambda: operator("Add", inputs=2, shared=True, dtype=np.int8),
        lambda: operator("Add", inputs=2, dtype=np.int8),
    ),
    "signed-activation:input": (lambda: convolution(pixels=np.int8), lambda: convolution(pixels=np.uint8)),
    "activation-type": (lambda: convolution(dtype=np.uint16), convolution),
    "moved-input:DepthToSpace": (
        lambda: convolution(before=between("DepthToSpace", blocksize=1)),
        lambda: convolution(before=between("Transpose", perm=[0, 1, 3, 2])),
    ),
    "moved-input": (lambda: gemm(before=between("Flatten")), lambda: gemm(before=reshaped)),
    "weight-zero-point": (lambda: gemm(weight=lambda s: s.weight((4, 8), zero_point=False)), gemm),
    "weight-axis": (lambda: gemm(weight=lambda s: s.weight((4, 8), axis=1)), gemm),
    "gemm-attributes": (lambda: gemm(bias=True, alpha=0.5), lambda: gemm(bias=True)),
    "float-constant": (lambda: operator("Add", constant=True), lambda: operator("Add", inputs=2)),
    "no-integer-kernel": (lambda: operator("Tanh"), lambda: operator("Sigmoid")),
    "no-integer-kernel:Sub": (lambda: operator("Sub", inputs=2), lambda: operator("Add", inputs=2)),
}
