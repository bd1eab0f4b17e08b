"""lower: read a QuantizedModel into an IntegerGraph. The only module of this room that knows the training room."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mecdeploy.export.errors import ExportError
from mecdeploy.export.fragments import Fragment, convert
from mecdeploy.export.graph import (
    Add,
    AveragePool,
    Concat,
    Conv,
    Dequantize,
    Elementwise,
    Flatten,
    FloatIsland,
    Gemm,
    GlobalAveragePool,
    IntegerGraph,
    MaxPool,
    Node,
    Quantization,
    Quantize,
    Reshape,
    Slice,
    Transpose,
    Value,
    Weight,
)
from mecdeploy.training.model import QuantizedModel, Step
from mecdeploy.training.movement import (
    ConcatUnit,
    DequantizeUnit,
    DropoutUnit,
    FloatUnit,
    MaxPoolUnit,
    QuantizeUnit,
    ReshapeUnit,
    SliceUnit,
    TransposeUnit,
)
from mecdeploy.training.plans import LOGITS, PIXELS
from mecdeploy.training.quantizers import QTensor
from mecdeploy.training.units import (
    AddUnit,
    AveragePoolUnit,
    ElementwiseUnit,
    GlobalAveragePoolUnit,
    WeightedUnit,
)

_T = TypeVar("_T", bound=np.generic)
_Values = Mapping[str, QTensor | Tensor]

EXAMPLE_IMAGES = 2
"""Blank images that show shapes; a second pass over one tells which axis holds the images."""


@torch.no_grad()
def lower(model: QuantizedModel, name: str = "mecdeploy") -> IntegerGraph:
    """The integers of a trained model, exactly as its evaluation mode uses them.

    Passes over blank images find every value's shape and quantisation; weights, scales and bias codes come from the
    same functions that evaluation calls; float islands go through torch.onnx. Raises ExportError where a step size or
    weight is not finite, and for an island that torch.onnx cannot write.
    """
    was_training = model.training
    try:
        model.eval()
        values = _run(model, EXAMPLE_IMAGES)
        # Without islands every kernel keeps the images first.
        axes = _batch_axes(values, _run(model, 1)) if model.islands() else dict.fromkeys(values, 0)
        alias = {PIXELS: PIXELS}
        nodes: list[Node] = []
        islands = _islands(model, values, axes)
        for step in model.program:
            unit = model.unit(step.unit)
            reads = tuple(alias.get(read, read) for read in step.reads)
            if isinstance(unit, DropoutUnit):
                alias[unit.output_names[0]] = reads[0]
                continue
            alias.update({output: output for output in unit.output_names})
            nodes.append(islands[step.unit](reads) if step.unit in islands else _node(step, unit, reads, values))
    finally:
        model.train(was_training)
    kept = {key: _value(key, value, axes[key]) for key, value in values.items() if alias.get(key) == key}
    return IntegerGraph(name=name, input=PIXELS, output=LOGITS, values=kept, nodes=tuple(nodes))


def _run(model: QuantizedModel, images: int) -> dict[str, QTensor | Tensor]:
    spec, device = model.spec, next(model.parameters()).device
    blank = torch.zeros(images, spec.channels, spec.height, spec.width, dtype=torch.uint8, device=device)
    x = model.quantize(blank)
    return {PIXELS: x, **{name: _outline(value) for _, name, value in model.values(x)}}


def _outline(value: QTensor | Tensor) -> QTensor | Tensor:
    """A value of the same shape and quantisation, all 0, that takes no memory: nothing else of it is read."""
    tensor = value.codes if isinstance(value, QTensor) else value
    nothing = tensor.new_zeros(()).expand(tensor.shape)
    return value.with_codes(nothing) if isinstance(value, QTensor) else nothing


def _batch_axes(many: _Values, one: _Values) -> dict[str, int]:
    """Where each value holds the images: the axis that grows with them."""
    axes = {}
    for name, value in many.items():
        pairs = enumerate(zip(_shape(value), _shape(one[name]), strict=True))
        axes[name] = next((axis for axis, (grown, size) in pairs if grown != size), 0)
    return axes


def _shape(value: QTensor | Tensor) -> tuple[int, ...]:
    return tuple(value.codes.shape if isinstance(value, QTensor) else value.shape)


def _islands(
    model: QuantizedModel, values: _Values, axes: Mapping[str, int]
) -> dict[str, Callable[[tuple[str, ...]], FloatIsland]]:
    """For every island, what makes its node once the names of its inputs are known."""
    steps = {step.unit: step for step in model.program}
    fragments = {}
    for name, unit in model.islands().items():
        reads = steps[name].reads
        examples = tuple(_example(values[read], unit, position) for position, read in enumerate(reads))
        fragments[name] = Fragment(
            module=unit.module,
            examples=examples,
            batch_axes=tuple(axes[read] for read in reads),
            images=EXAMPLE_IMAGES,
        )
    graphs = convert(fragments)

    def maker(name: str, unit: FloatUnit) -> Callable[[tuple[str, ...]], FloatIsland]:
        return lambda reads: FloatIsland(
            name=name,
            inputs=reads,
            outputs=unit.output_names,
            graph=graphs[name],
            operators=unit.operators,
            reason=unit.reason,
        )

    return {name: maker(name, unit) for name, unit in model.islands().items()}


def _example(value: QTensor | Tensor, unit: FloatUnit, position: int) -> Tensor:
    if not isinstance(value, QTensor):
        return value.contiguous()
    return value.stored() if unit.asks_for_batch_size and position == 0 else value.dequantize()


def _node(step: Step, unit: Any, reads: tuple[str, ...], values: _Values) -> Node:
    make = MAKERS.get(type(unit))
    if make is None:
        raise ExportError(
            f"{step.unit}: {type(unit).__name__} has no integer node; add one to export/graph.py and to capture."
        )
    return make(step.unit, unit, reads, values)


def _weighted(name: str, unit: WeightedUnit, reads: tuple[str, ...], values: _Values) -> Node:
    x = values[reads[0]]
    assert isinstance(x, QTensor)
    codes, step = unit.weight_quantizer(unit.weight)
    scale, bias = unit.folded(step, x.scale)
    for what, tensor in (("weights", codes), ("weight scales", scale), ("bias", bias)):
        if not bool(torch.isfinite(tensor).all()):
            raise ExportError(f"{name}: its {what} are not finite; train again with a lower learning rate.")
    levels = unit.weight_quantizer.levels
    weight = Weight(
        codes=_array(codes, np.int8),
        bits=unit.weight_quantizer.bits,
        scale=_array(scale, np.float32),
        levels=None if levels is None else _array(levels, np.int8),
    )
    integers = np.rint(_array(bias, np.float64)).astype(np.int32)
    output, geometry = unit.output_names[0], unit.geometry
    if geometry is None:
        return Gemm(name=name, input=reads[0], output=output, weight=weight, bias=integers)
    return Conv(
        name=name,
        input=reads[0],
        output=output,
        weight=weight,
        bias=integers,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
    )


def _max_pool(name: str, unit: MaxPoolUnit, reads: tuple[str, ...], values: _Values) -> Node:
    return MaxPool(
        name=name,
        input=reads[0],
        output=unit.output_names[0],
        kernel=unit.kernel,
        stride=unit.geometry.stride,
        padding=unit.geometry.padding,
        dilation=unit.geometry.dilation,
        ceil_mode=unit.ceil_mode,
    )


def _average_pool(name: str, unit: AveragePoolUnit, reads: tuple[str, ...], values: _Values) -> Node:
    return AveragePool(
        name=name,
        input=reads[0],
        output=unit.output_names[0],
        kernel=unit.kernel,
        stride=unit.geometry.stride,
        padding=unit.geometry.padding,
        count_include_pad=unit.include_pad,
    )


def _elementwise(name: str, unit: ElementwiseUnit, reads: tuple[str, ...], values: _Values) -> Node:
    return Elementwise(name=name, kind=unit.function, inputs=reads, output=unit.output_names[0], alpha=unit.alpha)


def _reshape(name: str, unit: ReshapeUnit, reads: tuple[str, ...], values: _Values) -> Node:
    kind = Flatten if len(unit.shape) == 1 else Reshape
    return kind(name=name, input=reads[0], output=unit.output_names[0])


def _slice(name: str, unit: SliceUnit, reads: tuple[str, ...], values: _Values) -> Node:
    return Slice(
        name=name,
        input=reads[0],
        output=unit.output_names[0],
        axis=unit.axis,
        start=unit.start,
        stop=unit.stop,
        step=unit.step,
    )


Maker = Callable[[str, Any, tuple[str, ...], _Values], Node]

MAKERS: Mapping[type, Maker] = MappingProxyType(
    {
        WeightedUnit: _weighted,
        AddUnit: lambda name, u, reads, _: Add(name=name, inputs=(reads[0], reads[1]), outputs=u.output_names),
        ElementwiseUnit: _elementwise,
        MaxPoolUnit: _max_pool,
        AveragePoolUnit: _average_pool,
        GlobalAveragePoolUnit: lambda name, u, reads, _: GlobalAveragePool(
            name=name, input=reads[0], output=u.output_names[0]
        ),
        ReshapeUnit: _reshape,
        TransposeUnit: lambda name, u, reads, _: Transpose(
            name=name, input=reads[0], output=u.output_names[0], permutation=u.permutation
        ),
        SliceUnit: _slice,
        ConcatUnit: lambda name, u, reads, _: Concat(name=name, inputs=reads, output=u.output_names[0], axis=u.axis),
        QuantizeUnit: lambda name, u, reads, _: Quantize(name=name, input=reads[0], output=u.output_names[0]),
        DequantizeUnit: lambda name, u, reads, _: Dequantize(name=name, input=reads[0], output=u.output_names[0]),
    }
)
"""Unit -> node."""


def _value(name: str, value: QTensor | Tensor, axis: int) -> Value:
    sizes = _shape(value)
    shape = (*sizes[:axis], *sizes[axis + 1 :])
    if not isinstance(value, QTensor):
        return Value(name=name, shape=shape, quantization=None, batch_axis=axis)
    quantization = Quantization(scale=float(value.scale), zero_point=value.zero_point, qmax=value.qmax, qmin=value.qmin)
    return Value(name=name, shape=shape, quantization=quantization, batch_axis=axis)


def _array(tensor: Tensor, dtype: type[_T]) -> NDArray[_T]:
    return tensor.detach().cpu().numpy().astype(dtype)
