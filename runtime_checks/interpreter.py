"""An integer interpreter: from the ONNX file alone to every integer that onnxruntime's fused kernels compute.

It matches DequantizeLinear -> op -> QuantizeLinear (-> Clip) in the file's order and computes each with the arithmetic
of arithmetic.py; the tables of products.py, pooling.py, elementwise.py and movement.py say how, by op type. A node it
has no arithmetic for is an error by name, never a guess. Float islands it does not compute: the integers that are
quantised from them are given to it, and everything from there on is its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mecdeploy.runtime_checks import arithmetic
from mecdeploy.runtime_checks.elementwise import ELEMENTWISE
from mecdeploy.runtime_checks.errors import CheckError
from mecdeploy.runtime_checks.model_file import LOGITS, ModelFile, ModelSource, read_model
from mecdeploy.runtime_checks.movement import MOVEMENT, movement
from mecdeploy.runtime_checks.patterns import Graph, fault
from mecdeploy.runtime_checks.pooling import POOLS
from mecdeploy.runtime_checks.products import PRODUCTS, real_gemm
from mecdeploy.runtime_checks.steps import Array, Step

_REQUANTIZING = {**PRODUCTS, **POOLS, **ELEMENTWISE}
_THROUGH_REALS = ("MaxPool", "Flatten", "Reshape")
"""Movement that may also stand between DequantizeLinear and QuantizeLinear, at one scale."""

_NOTHING: Mapping[str, Array] = MappingProxyType({})


class Interpreter:
    """A planned model; `run` may be called for any number of batches.

    computes_logits: False where a float island makes them.
    """

    def __init__(self, file: ModelFile) -> None:
        """Match every node of the graph; CheckError names the first that no integer kernel covers."""
        self._file = file
        self._graph = Graph(file.proto.graph, file.islands)
        self._given = frozenset(file.float_values)
        self._integers = {file.input_name} if file.input_dtype == "uint8" else set()
        self._float_inputs = {file.input_name} - self._integers
        self._reals: set[str] = set()
        self._steps = self._plan()
        self.computes_logits = LOGITS in self._reals

    def run(
        self,
        pixels: NDArray[np.uint8],
        *,
        outputs: Collection[str] | None = None,
        given: Mapping[str, Array] = _NOTHING,
    ) -> dict[str, Array]:
        """Stored uint8 codes of every integer tensor, and the float32 outputs of Gemms, for raw pixels [n, C, H, W].

        outputs: tensors to return; the others are dropped as soon as nothing reads them. None returns all.
        given: the codes of the file's float_values, uint8, taken as they are.
        """
        values: dict[str, Array] = {**self._file.feed(pixels), **self._checked(given)}
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

    def _checked(self, given: Mapping[str, Array]) -> dict[str, Array]:
        for name in sorted(self._given):
            if name not in given:
                raise CheckError(
                    f"{name}: it is quantised from what a float island computes, so its integers must be given. "
                    "Pass given={name: codes} with onnxruntime's."
                )
            if given[name].dtype != np.uint8:
                raise CheckError(f"{name}: given as {given[name].dtype}; stored codes are uint8. Pass onnxruntime's.")
        return {name: given[name] for name in self._given}

    def _plan(self) -> list[Step]:
        written = set(self._graph.producers)
        for name in self._file.float_values:
            if name not in written:
                raise CheckError(
                    f"{name}: the metadata says that it is quantised from a float island, but no node writes it. "
                    "Export the run again."
                )
        steps = []
        for node in self._graph.proto.node:
            step = self._match(node)
            if step is not None:
                steps.append(step)
        return steps

    def _match(self, node: onnx.NodeProto) -> Step | None:
        graph, (output, *others) = self._graph, node.output
        if graph.island(node) is not None:
            return None
        if all(graph.constants.get(name) is not None for name in (output, *others)):
            return None
        if output in self._given:
            self._take(node)
            return None
        if node.op_type == "DequantizeLinear":
            return self._match_dequantize(node)
        if node.op_type == "QuantizeLinear":
            return self._match_quantize(node)
        if node.op_type in MOVEMENT and node.input[0] in self._integers:
            return self._match_movement(node)
        if node.op_type == "Reshape" and node.input[0] in self._reals:
            return self._real(movement(graph, node))
        if node.op_type not in _REQUANTIZING and node.op_type not in _THROUGH_REALS:
            raise fault(node, "the integer interpreter has no arithmetic for it")
        if graph.stays_float(node):
            return self._real(real_gemm(graph, node))
        graph.quantized(node)  # refuses an output that stays float
        return None

    def _integer(self, step: Step) -> Step:
        self._integers.add(step.output)
        return step

    def _real(self, step: Step) -> Step:
        self._reals.add(step.output)
        return step

    def _take(self, node: onnx.NodeProto) -> None:
        """The end of a QuantizeLinear (-> Clip) from a float island: its codes are given."""
        source = node
        if node.op_type == "Clip" and node.input[0] in self._graph.producers:
            source = self._graph.producers[node.input[0]]
        if source.op_type != "QuantizeLinear" or not self._graph.written_by_island(source.input[0]):
            raise fault(node, "the metadata says that it is quantised from a float island, which it is not")
        self._integers.add(node.output[0])

    def _match_movement(self, node: onnx.NodeProto) -> Step:
        step = movement(self._graph, node)
        floating = [name for name in step.inputs if name not in self._integers]
        if floating:
            raise fault(node, f"{floating[0]!r} holds no stored integers, its first input does")
        return self._integer(step)

    def _match_dequantize(self, node: onnx.NodeProto) -> Step | None:
        """Nothing where the patterns of its readers, or islands, read it; a step where it makes the logits."""
        if node.output[0] not in self._graph.outputs:
            return None
        x = self._graph.quantization(node, node.input[0])
        dequantize = partial(arithmetic.dequantize, scale=x.scale, zero_point=x.zero_point)
        return self._real(Step(node.output[0], (x.tensor,), dequantize))

    def _match_quantize(self, node: onnx.NodeProto) -> Step | None:
        graph = self._graph
        target = graph.quantization(node, node.output[0])
        source = node.input[0]
        if source in self._float_inputs:
            quantize = partial(arithmetic.quantize, scale=target.scale, zero_point=target.zero_point)
            return self._integer(Step(target.tensor, (source,), quantize))
        if graph.written_by_island(source):
            self._refuse_unless_given(node)
            return None
        producer = graph.producers.get(source)
        if producer is None or source in self._reals:
            raise fault(node, f"it quantises {source!r}, which no integer kernel computes")
        if producer.op_type in _REQUANTIZING:
            return self._integer(_REQUANTIZING[producer.op_type](graph, producer, target))
        if producer.op_type not in _THROUGH_REALS:
            raise fault(node, f"it quantises {source!r}, which no integer kernel computes")
        x = graph.dequantized(producer, 0)
        if (x.scale, x.zero_point) != (target.scale, target.zero_point):
            raise fault(producer, "its input and output scales differ, so it runs in float")
        return self._integer(Step(target.tensor, (x.tensor,), MOVEMENT[producer.op_type](graph, producer)))

    def _refuse_unless_given(self, node: onnx.NodeProto) -> None:
        """A QuantizeLinear from an island, before the Clip whose output is given."""
        readers = self._graph.consumers[node.output[0]]
        if not readers or any(reader.op_type != "Clip" or reader.output[0] not in self._given for reader in readers):
            raise fault(node, "it quantises what a float island computes, which the metadata does not say")


def interpret(
    model: ModelSource, pixels: NDArray[np.uint8], given: Mapping[str, NDArray[Any]] = _NOTHING
) -> dict[str, Array]:
    """Every integer tensor of a mecdeploy ONNX file, and its logits, for raw pixels [n, C, H, W]."""
    return Interpreter(read_model(model)).run(pixels, given=given)
