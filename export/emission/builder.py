"""An ONNX graph in the making: nodes, initialisers and the quantise and dequantise pairs between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, TensorProto, ValueInfoProto, helper

from mecdeploy.export.errors import ExportError
from mecdeploy.export.graph import IntegerGraph, Quantization

BATCH = "N"
"""Name of the batch dimension."""


class GraphBuilder:
    """Collects one ONNX graph. Tensor names are unique; initialisers hold raw_data, never varints."""

    def __init__(self, graph: IntegerGraph) -> None:
        """graph: where the values' quantizations come from."""
        self.values = graph.values
        self._proto = GraphProto(name=graph.name)
        self._names: set[str] = set()
        self._shared: set[str] = set()
        self._dequantized: set[str] = set()

    def input(self, name: str, element: int, shape: Sequence[int]) -> str:
        """Declare a graph input, batch dimension first."""
        self._proto.input.append(self._declare(name, element, shape))
        return self._claim(name)

    def output(self, name: str, element: int, shape: Sequence[int]) -> None:
        """Declare a tensor that is written already a graph output, batch dimension first."""
        self._proto.output.append(self._declare(name, element, shape))

    def node(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Append a node of one output, named after it, and return the output's name."""
        self._proto.node.append(helper.make_node(op_type, inputs, [self._claim(output)], name=output, **attributes))
        return output

    def initializer(self, name: str, array: NDArray[Any], element: int | None = None) -> str:
        """Store an array as raw data. element: TensorProto type; None takes the array's own."""
        chosen = helper.np_dtype_to_tensor_dtype(array.dtype) if element is None else element
        return self.packed_initializer(name, array, chosen, array.shape)

    def packed_initializer(self, name: str, data: NDArray[Any], element: int, shape: Sequence[int]) -> str:
        """Store bytes that hold a tensor of `shape` in an element type of their own (INT4, INT2)."""
        little_endian = data.astype(data.dtype.newbyteorder("<"), copy=False)
        tensor = self._proto.initializer.add(name=self._claim(name), data_type=element)
        tensor.dims.extend(shape)
        tensor.raw_data = little_endian.tobytes()
        return name

    def shared(self, name: str, array: NDArray[Any]) -> str:
        """Store an array that many nodes read, once."""
        if name not in self._shared:
            self._shared.add(name)
            self.initializer(name, array)
        return name

    def quantize(self, real: str, name: str) -> str:
        """Write value `name`: real -> uint8 codes, held at qmax by an integer Clip where that is below 255.

        A float Clip before QuantizeLinear would keep the kernel in float.
        """
        quantization = self._quantization(name)
        scale, zero_point = self._parameters(name, quantization)
        if quantization.qmax == 255:
            return self.node("QuantizeLinear", [real, scale, zero_point], name)
        unclipped = self.node("QuantizeLinear", [real, scale, zero_point], f"{name}/unclipped")
        qmax = self.shared(f"qmax/{quantization.qmax}", np.array(quantization.qmax, np.uint8))
        return self.node("Clip", [unclipped, "", qmax], name)

    def dequantize(self, name: str) -> str:
        """Return value `name` as reals; the first consumer writes the node, the others share it."""
        real = f"{name}/real"
        if name not in self._dequantized:
            self._dequantized.add(name)
            self.node("DequantizeLinear", [name, *self._parameters(name, self._quantization(name))], real)
        return real

    def proto(self) -> GraphProto:
        """Return the finished graph."""
        return self._proto

    def _parameters(self, name: str, quantization: Quantization) -> tuple[str, str]:
        return (
            self.shared(f"{name}/scale", np.array(quantization.scale, np.float32)),
            self.shared(f"{name}/zero_point", np.array(quantization.zero_point, np.uint8)),
        )

    def _quantization(self, name: str) -> Quantization:
        quantization = self.values[name].quantization
        assert quantization is not None  # validate_graph lets only the output be float
        return quantization

    def _declare(self, name: str, element: int, shape: Sequence[int]) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, element, [BATCH, *shape])

    def _claim(self, name: str) -> str:
        if name in self._names:
            raise ExportError(f"{name}: two tensors of the ONNX file would have this name; rename the unit.")
        self._names.add(name)
        return name


FLOAT, UINT8, INT8, INT32 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32
