"""How onnxruntime is best given swish on integers: three inverted residual blocks with each form, interleaved.

    python -m benchmarks.swish

relu: no swish at all. kernels: QLinearSigmoid and QLinearMul. hard: hard-swish as QLinearAdd and QLinearMul. table: a
table of 256 codes through Gather. float: Sigmoid and Mul between DequantizeLinear and QuantizeLinear.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

RESULT = Path(__file__).parent / "results" / "swish.json"
CHANNELS, EXPANDED, SIDE, BLOCKS = 64, 256, 28, 3
ROUNDS = 200
FORMS = ("relu", "kernels", "hard", "table", "float")
BEFORE, AFTER = (0.03, 128), (0.02, 14)
"""Scale and zero point of what swish reads and writes; they change no kernel's time."""


class Blocks:
    """An ONNX graph of QDQ convolutions with one form of activation."""

    def __init__(self, form: str) -> None:
        self.form, self.rng = form, np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def model(self) -> bytes:
        """The whole network: uint8 codes in, reals out."""
        quantization = (0.02, 128)
        codes = "x"
        before = (0.03, 0) if self.form == "relu" else BEFORE
        after = before if self.form == "relu" else AFTER
        for _ in range(BLOCKS):
            codes = self.activation(self.convolution(codes, quantization, before, CHANNELS, EXPANDED, 1, 1))
            codes = self.activation(self.convolution(codes, after, before, EXPANDED, EXPANDED, 3, EXPANDED))
            codes = self.convolution(codes, after, quantization, EXPANDED, CHANNELS, 1, 1)
        result = self.dequantize(codes, quantization)
        graph = helper.make_graph(
            self.nodes,
            self.form,
            [helper.make_tensor_value_info("x", TensorProto.UINT8, ["N", CHANNELS, SIDE, SIDE])],
            [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return bytes(model.SerializeToString())

    def activation(self, codes: str) -> str:
        """The form's nodes behind one convolution."""
        if self.form == "relu":
            return codes
        if self.form == "table":
            table = self.constant(self.rng.integers(0, 256, 256).astype(np.uint8))
            return self.node("Gather", [table, self.node("Cast", [codes], to=TensorProto.INT32)])
        real = self.dequantize(codes, BEFORE)
        if self.form == "float":
            return self.quantize(self.node("Mul", [real, self.node("Sigmoid", [real])]), AFTER)
        if self.form == "kernels":
            gate = self.quantize(self.node("Sigmoid", [real]), (1 / 255, 0))
        else:
            half = self.dequantize(self.constant(np.uint8(1)), (0.5, 0))
            sixth = self.dequantize(codes, (BEFORE[0] / 6, BEFORE[1]))
            gate = self.quantize(self.node("Add", [half, sixth]), (1 / 255, 0))
        return self.quantize(self.node("Mul", [real, self.dequantize(gate, (1 / 255, 0))]), AFTER)

    def convolution(
        self,
        codes: str,
        read: tuple[float, int],
        written: tuple[float, int],
        inputs: int,
        outputs: int,
        kernel: int,
        groups: int,
    ) -> str:
        """One quantised convolution with random weights."""
        shape = (outputs, inputs // groups, kernel, kernel)
        scale = np.full(outputs, 0.01 / np.sqrt(np.prod(shape[1:])), np.float32)
        weight = self.constant(self.rng.integers(-127, 128, shape).astype(np.int8))
        zero_points = self.constant(np.zeros(outputs, np.int8))
        real_weight = self.node("DequantizeLinear", [weight, self.constant(scale), zero_points], axis=0)
        bias = self.constant(np.zeros(outputs, np.int32))
        real_bias = self.node("DequantizeLinear", [bias, self.constant(np.float32(read[0]) * scale)], axis=0)
        inputs_ = [self.dequantize(codes, read), real_weight, real_bias]
        return self.quantize(self.node("Conv", inputs_, group=groups, pads=[kernel // 2] * 4), written)

    def quantize(self, real: str, quantization: tuple[float, int]) -> str:
        """QuantizeLinear to uint8."""
        return self.node("QuantizeLinear", [real, *self.parameters(quantization)])

    def dequantize(self, codes: str, quantization: tuple[float, int]) -> str:
        """DequantizeLinear from uint8."""
        return self.node("DequantizeLinear", [codes, *self.parameters(quantization)])

    def parameters(self, quantization: tuple[float, int]) -> tuple[str, str]:
        """Scale and zero point as constants."""
        return self.constant(np.float32(quantization[0])), self.constant(np.uint8(quantization[1]))

    def constant(self, value: NDArray[Any] | np.generic) -> str:
        """A new initialiser."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        """A new node and its output, named alike."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name


def main() -> None:
    """Time all forms in turns and write the result file."""
    from benchmarks.environment import describe_environment, load_average
    from mecdeploy.runtime_checks import compare_latency

    pixels = np.random.default_rng(0).integers(0, 256, (1, CHANNELS, SIDE, SIDE)).astype(np.uint8)
    models = {form: Blocks(form).model() for form in FORMS}
    times = compare_latency(models, dict.fromkeys(FORMS, {"x": pixels}), rounds=ROUNDS)
    rows = {
        form: {
            "median_ms": round(1e3 * times[form].median, 3),
            "of_relu": round(times[form].ratio_to(times["relu"]), 3),
            "kernels": kernels(models[form]),
        }
        for form in FORMS
    }
    environment = describe_environment(seed=0, threads=1)
    result = {"environment": environment, "load_average": load_average(), "rounds": ROUNDS, "forms": rows}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


def kernels(model: bytes) -> dict[str, int]:
    """Op types of the graph that onnxruntime runs."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.log_severity_level = 4
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    return dict(sorted(Counter(node.op_type for node in graph.node).items()))


if __name__ == "__main__":
    main()
