"""The rules an IntegerGraph obeys as a whole. Checked where a graph enters the compiler and after every pass.

rules.py has what each node type demands beyond its wiring; weight_rules.py what Conv and Gemm demand.
"""

from __future__ import annotations

import math

import numpy as np

from mecdeploy.export.errors import ExportError
from mecdeploy.export.graph import (
    Dequantize,
    FloatIsland,
    Gemm,
    IntegerGraph,
    Node,
    Quantization,
    Quantize,
    Value,
    inputs_of,
    outputs_of,
)
from mecdeploy.export.refusal import refuse
from mecdeploy.export.rules import RULES
from mecdeploy.export.shapes import output_shape


def validate_graph(graph: IntegerGraph) -> None:
    """Raise ExportError, naming the node and the value, unless integer kernels can run the graph as it stands."""
    _check_ends(graph)
    for key, value in graph.values.items():
        _check_value(key, value)
    written: dict[str, Node | None] = {graph.input: None}
    names: set[str] = set()
    for node in graph.nodes:
        if node.name in names:
            refuse(node, "the name is used by two nodes; rename one")
        names.add(node.name)
        _check_inputs(node, graph, written)
        _check_outputs(node, graph, written)
        _check_batch(node, graph)
        written.update(dict.fromkeys(outputs_of(node), node))
        RULES[type(node)](node, graph)
    if graph.output not in written:
        raise ExportError(f"{graph.name}: no node writes the graph's output {graph.output}.")


def _check_ends(graph: IntegerGraph) -> None:
    if not graph.nodes:
        raise ExportError(f"{graph.name}: the graph has no nodes; there is nothing to export.")
    for end in (graph.input, graph.output):
        if end not in graph.values:
            raise ExportError(f"{graph.name}: {end} is an end of the graph but not among its values.")
    pixels = graph.values[graph.input]
    if pixels.quantization is None or pixels.quantization.qmax != 255 or len(pixels.shape) != 3 or pixels.batch_axis:
        raise ExportError(
            f"{graph.name}: the input {graph.input} has shape {pixels.shape} and {pixels.quantization}; "
            "uint8 pixels (C, H, W) with a quantization of qmax 255 are due."
        )
    logits = graph.values[graph.output]
    if logits.quantization is not None:
        raise ExportError(f"{graph.name}: the output {graph.output} is quantized; the logits must be float.")
    if logits.batch_axis != 0:
        raise ExportError(f"{graph.name}: the output {graph.output} has images on axis {logits.batch_axis}; 0 is due.")


def _check_value(key: str, value: Value) -> None:
    if key != value.name or not key:
        raise ExportError(f"value {value.name!r} is filed under {key!r}; use its name.")
    if not value.shape or any(size < 1 for size in value.shape):
        raise ExportError(f"value {key}: shape {value.shape}; every dimension must be at least 1.")
    if not 0 <= value.batch_axis <= len(value.shape):
        raise ExportError(f"value {key}: batch_axis is {value.batch_axis}; its shape {value.shape} has no such axis.")
    if value.quantization is not None:
        _check_quantization(key, value.quantization)


def _check_quantization(name: str, quantization: Quantization) -> None:
    scale, zero_point, qmax = quantization.scale, quantization.zero_point, quantization.qmax
    if not (math.isfinite(scale) and scale >= np.finfo(np.float32).tiny):
        raise ExportError(f"value {name}: scale is {scale}; it must be finite, positive and a normal float32.")
    if float(np.float32(scale)) != scale:
        raise ExportError(f"value {name}: scale {scale!r} is not a float32; round it where it is learned.")
    if qmax not in {(1 << bits) - 1 for bits in range(1, 9)}:
        raise ExportError(f"value {name}: qmax is {qmax}; it must be 2^bits - 1, for 1 to 8 bits.")
    if not 0 <= zero_point <= qmax:
        raise ExportError(f"value {name}: zero_point is {zero_point}, outside its codes 0..{qmax}.")
    if quantization.qmin not in (0, zero_point):
        raise ExportError(f"value {name}: qmin is {quantization.qmin}; 0 or, after a ReLU, the zero_point is due.")


def _check_inputs(node: Node, graph: IntegerGraph, written: dict[str, Node | None]) -> None:
    """Every input is written before it is read; only islands, and Quantize behind them, read floats."""
    for name in (*inputs_of(node), *outputs_of(node)):
        if name not in graph.values:
            refuse(node, f"uses {name}, which is not among the graph's values")
    for name in inputs_of(node):
        if name not in written:
            refuse(node, f"reads {name} before any node writes it")
        is_float = graph.values[name].quantization is None
        if is_float and not isinstance(node, FloatIsland | Quantize):
            refuse(node, f"reads {name}, which is float; only a FloatIsland and a Quantize may")
        if isinstance(node, Quantize) and not is_float:
            refuse(node, f"quantizes {name}, which is quantized already; onnxruntime would merge the two into others")
        if isinstance(node, Quantize) and isinstance(written[name], Gemm):
            refuse(node, f"quantizes {name}, which a Gemm writes; let the Gemm write codes: it rounds only once then")


def _check_outputs(node: Node, graph: IntegerGraph, written: dict[str, Node | None]) -> None:
    """Every output is written once, in its shape, and as codes unless the node may write floats."""
    if not outputs_of(node):
        refuse(node, "has no output")
    for position, name in enumerate(outputs_of(node)):
        if name in written or name in outputs_of(node)[:position]:
            refuse(node, f"writes {name}, which is written already")
        is_float = graph.values[name].quantization is None
        if is_float and not isinstance(node, Gemm | FloatIsland | Dequantize):
            refuse(node, f"writes {name} without a quantization; onnxruntime would run it in float")
        if not is_float and isinstance(node, FloatIsland | Dequantize):
            refuse(node, f"writes {name} with a quantization; its output is float, and a Quantize makes codes of it")
        if isinstance(node, Dequantize) and name != graph.output:
            refuse(node, f"writes {name}; it is for the graph's output {graph.output} alone")
    expected = output_shape(node, [graph.values[name].shape for name in inputs_of(node)])
    for name in outputs_of(node):
        if expected is not None and graph.values[name].shape != expected:
            refuse(node, f"writes {name} of shape {graph.values[name].shape}; its inputs make {expected}")


def _check_batch(node: Node, graph: IntegerGraph) -> None:
    """Images stand first; where islands put tokens before them, a Quantize and a Gemm leave them where they are."""
    axes = {name: graph.values[name].batch_axis for name in (*inputs_of(node), *outputs_of(node))}
    if isinstance(node, FloatIsland) or not any(axes.values()):
        return
    if not isinstance(node, Gemm | Quantize):
        name, axis = next((name, axis) for name, axis in axes.items() if axis)
        refuse(node, f"uses {name}, which has images on axis {axis}; only FloatIslands, Quantizes and Gemms may")
    before, after = axes[node.input], axes[node.output]
    if before != after:
        refuse(node, f"moves images from axis {before} of {node.input} to axis {after} of {node.output}; they stay")
    if isinstance(node, Gemm) and before == len(graph.values[node.input].shape):
        refuse(node, f"reads {node.input}, whose last axis is that of the images; features are due there")
