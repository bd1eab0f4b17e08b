"""lower: read a QuantizedModel into an IntegerGraph. The only module of this room that knows the training room."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mecdeploy.export.errors import ExportError
from mecdeploy.export.graph import (
    Add,
    Conv,
    Flatten,
    Gemm,
    GlobalAveragePool,
    IntegerGraph,
    MaxPool,
    Node,
    Quantization,
    Value,
    Weight,
)
from mecdeploy.training.model import LOGITS, QuantizedModel, Step
from mecdeploy.training.patterns import PIXELS
from mecdeploy.training.quantizers import QTensor
from mecdeploy.training.units import (
    AddUnit,
    DropoutUnit,
    FlattenUnit,
    Geometry,
    GlobalAveragePoolUnit,
    MaxPoolUnit,
    Unit,
    WeightedUnit,
)

_T = TypeVar("_T", bound=np.generic)


@torch.no_grad()
def lower(model: QuantizedModel, name: str = "mecdeploy") -> IntegerGraph:
    """The integers of a trained model, exactly as its evaluation mode uses them.

    One pass over a blank image finds every value's shape and quantisation; weights, scales and bias codes come from the
    same functions that evaluation calls. Raises ExportError where a step size or weight is not finite.
    """
    was_training = model.training
    try:
        model.eval()
        values = _run(model)
    finally:
        model.train(was_training)
    alias = {PIXELS: PIXELS}
    nodes: list[Node] = []
    for step in model.program:
        unit = model.unit(step.unit)
        reads = tuple(alias[read] for read in step.reads)
        if isinstance(unit, DropoutUnit):
            alias[unit.output_names[0]] = reads[0]
            continue
        alias.update({output: output for output in unit.output_names})
        nodes.append(_node(step, unit, reads, values))
    kept = {key: _value(key, value) for key, value in values.items() if alias.get(key) == key}
    return IntegerGraph(name=name, input=PIXELS, output=LOGITS, values=kept, nodes=tuple(nodes))


def _run(model: QuantizedModel) -> dict[str, QTensor | Tensor]:
    spec, device = model.spec, next(model.parameters()).device
    blank = torch.zeros(1, spec.channels, spec.height, spec.width, dtype=torch.uint8, device=device)
    x = model.quantize(blank)
    return {PIXELS: x, **{name: value for _, name, value in model.values(x)}}


def _node(step: Step, unit: Unit, reads: tuple[str, ...], values: Mapping[str, QTensor | Tensor]) -> Node:
    name, output = step.unit, unit.output_names[0]
    if isinstance(unit, WeightedUnit):
        return _weighted(name, unit, reads[0], values[reads[0]])
    if isinstance(unit, AddUnit):
        return Add(name=name, inputs=(reads[0], reads[1]), outputs=unit.output_names)
    if isinstance(unit, MaxPoolUnit):
        return MaxPool(
            name=name,
            input=reads[0],
            output=output,
            kernel=unit.kernel,
            stride=unit.geometry.stride,
            padding=_sides(unit.geometry),
            dilation=unit.geometry.dilation,
            ceil_mode=unit.ceil_mode,
        )
    if isinstance(unit, GlobalAveragePoolUnit):
        return GlobalAveragePool(name=name, input=reads[0], output=output)
    if isinstance(unit, FlattenUnit):
        return Flatten(name=name, input=reads[0], output=output)
    raise ExportError(f"{name}: {type(unit).__name__} has no integer node; add one to export/graph.py and to capture.")


def _weighted(name: str, unit: WeightedUnit, source: str, x: QTensor | Tensor) -> Node:
    assert isinstance(x, QTensor)
    codes, step = unit.weight_quantizer(unit.weight)
    scale, bias = unit.folded(step, x.scale)
    for what, tensor in (("weights", codes), ("weight scales", scale), ("bias", bias)):
        if not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"{name}: its {what} are not finite; train again with a lower learning rate.")
    weight = Weight(codes=_array(codes, np.int8), bits=unit.weight_quantizer.bits, scale=_array(scale, np.float32))
    integers = np.rint(_array(bias, np.float64)).astype(np.int32)
    output, geometry = unit.output_names[0], unit.geometry
    if geometry is None:
        return Gemm(name=name, input=source, output=output, weight=weight, bias=integers)
    return Conv(
        name=name,
        input=source,
        output=output,
        weight=weight,
        bias=integers,
        stride=geometry.stride,
        padding=_sides(geometry),
        dilation=geometry.dilation,
        groups=geometry.groups,
    )


def _sides(geometry: Geometry) -> tuple[int, int, int, int]:
    height, width = geometry.padding
    return (height, width, height, width)


def _value(name: str, value: QTensor | Tensor) -> Value:
    if not isinstance(value, QTensor):
        return Value(name=name, shape=tuple(value.shape[1:]), quantization=None)
    quantization = Quantization(scale=float(value.scale), zero_point=value.zero_point, qmax=value.qmax)
    return Value(name=name, shape=tuple(value.codes.shape[1:]), quantization=quantization)


def _array(tensor: Tensor, dtype: type[_T]) -> NDArray[_T]:
    return tensor.detach().cpu().numpy().astype(dtype)
