"""Pieces of a PyTorch network that stay in float, as pieces of ONNX: torch.onnx writes them.

Many islands of a network are alike but for their weights (the blocks of a transformer), so each distinct one is
exported once, with its float weights as inputs, and takes its own weights afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import GraphProto, ModelProto, numpy_helper
from torch import Tensor, fx, nn

from mecdeploy.export.errors import ExportError

OPSET = 21


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """One island. module: returns a tuple. examples: its inputs for a few images; batch_axes: where each has them.

    images: how many images the examples stand for; a batch axis may hold a multiple of that.
    """

    module: fx.GraphModule
    examples: tuple[Tensor, ...]
    batch_axes: tuple[int, ...]
    images: int


def convert(fragments: Mapping[str, Fragment]) -> dict[str, GraphProto]:
    """Every fragment as an ONNX graph whose inputs and outputs stand in the module's order.

    Raises ExportError naming the island that torch.onnx cannot write.
    """
    kinds: dict[str, str] = {}
    keys = {name: _key(fragment) for name, fragment in fragments.items()}
    for name, key in keys.items():
        kinds.setdefault(key, name)
    templates = _export_all({name: fragments[name] for name in kinds.values()})
    return {name: _with_weights(templates[kinds[keys[name]]], fragment) for name, fragment in fragments.items()}


def _key(fragment: Fragment) -> str:
    """What two fragments have in common when only their float weights differ."""
    order = {node: str(index) for index, node in enumerate(fragment.module.graph.nodes)}
    lines = [str([(tuple(x.shape), str(x.dtype)) for x in fragment.examples]), str(fragment.batch_axes)]
    for node in fragment.module.graph.nodes:
        if node.op == "get_attr":
            tensor = _attribute(fragment.module, node)
            content = "" if _is_weight(tensor) else hashlib.sha256(tensor.numpy(force=True).tobytes()).hexdigest()
            lines.append(f"constant {tuple(tensor.shape)} {tensor.dtype} {content}")
        else:
            arguments = fx.map_arg((node.args, node.kwargs), lambda n: order[n])
            lines.append(f"{node.op} {node.target if node.op == 'call_function' else ''} {arguments}")
    return "\n".join(lines)


def _attribute(module: nn.Module, node: fx.Node) -> Tensor:
    tensor = getattr(module, str(node.target))
    assert isinstance(tensor, Tensor)
    return tensor


def _is_weight(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _weights(fragment: Fragment) -> list[Tensor]:
    """The float constants of a fragment, in the order in which its template takes them."""
    nodes = [node for node in fragment.module.graph.nodes if node.op == "get_attr"]
    return [tensor for node in nodes if _is_weight(tensor := _attribute(fragment.module, node))]


class _Template(nn.Module):
    """Several fragments side by side, each with its weights as further inputs."""

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_weights_as_inputs(fragment) for fragment in fragments)

    def forward(self, arguments: list[list[Tensor]]) -> tuple[tuple[Tensor, ...], ...]:
        return tuple(part(*inputs) for part, inputs in zip(self.parts, arguments, strict=True))


def _weights_as_inputs(fragment: Fragment) -> fx.GraphModule:
    graph, made = fx.Graph(), {}
    nodes = list(fragment.module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    weights = [n for n in nodes if n.op == "get_attr" and _is_weight(_attribute(fragment.module, n))]
    for position, node in enumerate((*inputs, *weights)):
        made[node] = graph.placeholder(f"argument_{position}")
    for node in nodes:
        if node not in made:
            made[node] = graph.node_copy(node, lambda source: made[source])
    return fx.GraphModule(fragment.module, graph)


def _export_all(fragments: Mapping[str, Fragment]) -> dict[str, GraphProto]:
    """One export for all, falling back to one each to find the culprit."""
    if not fragments:
        return {}
    try:
        return dict(zip(fragments, _export(list(fragments.values())), strict=True))
    except Exception as error:
        for name, fragment in fragments.items():
            try:
                _export([fragment])
            except Exception as own:
                operators = sorted({str(n.target) for n in fragment.module.graph.nodes if n.op == "call_function"})
                raise ExportError(
                    f"{name}: torch.onnx cannot write this island ({', '.join(operators)}): {_innermost(own)}. "
                    "Rewrite the operator with others that ONNX knows."
                ) from own
        raise ExportError(f"torch.onnx cannot write the float islands: {error}") from error


def _innermost(error: BaseException) -> str:
    """The first line of what torch.onnx's error began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.strip().rstrip(".")[:300]


def _export(fragments: Sequence[Fragment]) -> list[GraphProto]:
    # Copies: torch.export takes one tensor that two islands read for one input.
    arguments = [[x.clone() for x in (*fragment.examples, *_weights(fragment))] for fragment in fragments]
    shapes = [
        [
            *(
                {axis: batch if x.shape[axis] == fragment.images else (x.shape[axis] // fragment.images) * batch}
                for x, axis in zip(fragment.examples, fragment.batch_axes, strict=True)
            ),
            *(None for _ in _weights(fragment)),
        ]
        # A size of its own for each, else one would take its batch size from another's input.
        for fragment, batch in ((fragment, torch.export.Dim(f"batch_{i}")) for i, fragment in enumerate(fragments))
    ]
    template = _Template(fragments).eval()
    graph = write_onnx(template, (arguments,), dynamic_shapes=(shapes,)).graph
    inputs = iter([value.name for value in graph.input])
    outputs = iter([value.name for value in graph.output])
    found = []
    for fragment, given in zip(fragments, arguments, strict=True):
        count = len(next(node for node in reversed(fragment.module.graph.nodes) if node.op == "output").args[0])
        found.append(_part(graph, [next(inputs) for _ in given], [next(outputs) for _ in range(count)]))
    return found


@torch.no_grad()
def write_onnx(
    model: nn.Module,
    arguments: tuple[Any, ...],
    dynamic_shapes: Any,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> ModelProto:
    """A float module as ONNX, by torch.onnx, which is kept from printing: what goes wrong is raised.

    arguments, dynamic_shapes: as torch.export takes them.
    """
    with _quiet():
        program = torch.export.export(model, arguments, dynamic_shapes=dynamic_shapes, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=input_names,
            output_names=output_names,
        )
    assert exported is not None
    model_proto = exported.model_proto
    for node in model_proto.graph.node:  # stack traces of the machine that exports
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    return model_proto


def _part(graph: GraphProto, inputs: list[str], outputs: list[str]) -> GraphProto:
    """What of a graph the outputs depend on."""
    declared = {value.name: value for value in (*graph.input, *graph.output)}
    writers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    needed: set[str] = set()
    todo = list(outputs)
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += list(writers[name].input) if name in writers else []
    part = GraphProto(name="island")
    part.node.extend(node for node in graph.node if needed.intersection(node.output))
    part.initializer.extend(tensor for name, tensor in constants.items() if name in needed)
    part.input.extend(declared[name] for name in inputs)
    part.output.extend(declared[name] for name in outputs)
    return part


def _with_weights(template: GraphProto, fragment: Fragment) -> GraphProto:
    """The template with its last inputs turned into constants, the fragment's weights."""
    graph = GraphProto()
    graph.CopyFrom(template)
    count = len(fragment.examples)
    for value, tensor in zip(template.input[count:], _weights(fragment), strict=True):
        graph.initializer.append(numpy_helper.from_array(tensor.numpy(force=True), value.name))
    del graph.input[count:]
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx prints and warns about its own workings; what goes wrong is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(before)
