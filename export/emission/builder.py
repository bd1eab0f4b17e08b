"""An ONNX graph in the making: nodes, initialisers and the quantise and dequantise pairs between them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from mecdeploy.export.errors import ExportError
from mecdeploy.export.graph import IntegerGraph, Quantization, Quantize

BATCH = "N"
"""Name of the batch dimension."""


class GraphBuilder:
    """Collects one ONNX graph. Tensor names are unique; initialisers hold raw_data, never varints."""

    def __init__(self, graph: IntegerGraph) -> None:
        """graph: where the values' quantizations come from.

        quantized_floats: the float values that a Quantize reads.
        """
        self.values = graph.values
        self.quantized_floats = frozenset(node.input for node in graph.nodes if isinstance(node, Quantize))
        self._proto = GraphProto(name=graph.name)
        self._names: set[str] = set()
        self._shared: dict[str, NDArray[Any]] = {}
        self._dequantized: set[str] = set()
        self._constants: dict[tuple[int, tuple[int, ...], bytes], str] = {}

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
        """Store an array that many nodes read, once. Two different ones of one name are refused."""
        if name not in self._shared:
            self._shared[name] = array
            self.initializer(name, array)
        elif not np.array_equal(self._shared[name], array):
            self._claim(name)
        return name

    def constant(self, tensor: TensorProto, name: str) -> str:
        """Store a tensor of a FloatIsland; equal ones are stored once, under the first one's name. Returns the name."""
        array = numpy_helper.to_array(tensor)
        key = (tensor.data_type, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._constants:
            self._proto.initializer.append(numpy_helper.from_array(array, self._claim(name)))
            self._constants[key] = name
        return self._constants[key]

    def splice(self, node: NodeProto) -> None:
        """Append a finished node, whose tensors have their names already."""
        for output in filter(None, node.output):
            self._claim(output)
        self._proto.node.append(node)

    def quantize(self, real: str, codes: str, *, like: str = "") -> str:
        """Write `codes`: real -> uint8 codes, held at qmin and qmax by an integer Clip where uint8 does not hold them.

        like: the value whose quantization it is; by default the one named like the codes. A float Clip before
        QuantizeLinear would keep the kernel in float.
        """
        value = like or codes
        quantization, parameters = self.quantization(value), self._parameters(value)
        qmin, qmax = quantization.qmin, quantization.qmax
        if (qmin, qmax) == (0, 255):
            return self.node("QuantizeLinear", [real, *parameters], codes)
        unclipped = self.node("QuantizeLinear", [real, *parameters], f"{codes}/unclipped")
        lowest = self.shared(f"qmin/{qmin}", np.array(qmin, np.uint8)) if qmin > 0 else ""
        highest = self.shared(f"qmax/{qmax}", np.array(qmax, np.uint8)) if qmax < 255 else ""
        return self.node("Clip", [unclipped, lowest, highest] if highest else [unclipped, lowest], codes)

    def dequantize(self, codes: str, *, like: str = "", real: str = "") -> str:
        """Return codes as reals; the first consumer writes the node, the others share it.

        like: the value whose quantization it is; by default the one named like the codes. real: the output's name; by
        default `<codes>/real`.
        """
        real = real or f"{codes}/real"
        if real not in self._dequantized:
            self._dequantized.add(real)
            self.node("DequantizeLinear", [codes, *self._parameters(like or codes)], real)
        return real

    def quantization(self, value: str) -> Quantization:
        """How a value is quantised; only where validate_graph lets no float value be."""
        quantization = self.values[value].quantization
        assert quantization is not None
        return quantization

    def proto(self) -> GraphProto:
        """Return the finished graph."""
        return self._proto

    def _parameters(self, value: str) -> tuple[str, str]:
        quantization = self.quantization(value)
        return (
            self.shared(f"{value}/scale", np.array(quantization.scale, np.float32)),
            self.shared(f"{value}/zero_point", np.array(quantization.zero_point, np.uint8)),
        )

    def _declare(self, name: str, element: int, shape: Sequence[int]) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, element, [BATCH, *shape])

    def _claim(self, name: str) -> str:
        if name in self._names:
            raise ExportError(f"{name}: two tensors of the ONNX file would have this name; rename the unit.")
        self._names.add(name)
        return name


FLOAT, UINT8, INT8, INT32 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32
