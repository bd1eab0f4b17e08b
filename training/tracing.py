"""From a float module to one flat graph of PyTorch's own operators, by torch.export.

The graph is brought into a normal form in which planning needs to know one spelling of everything: no operator writes
in place, no tensor of the model is a constant in disguise, and every value knows its shape.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.exporting import export_graph, is_not_the_users, require_one_input
from mecdeploy.training.given_model import own_copy
from mecdeploy.training.input_spec import InputSpec

EXAMPLE_BATCH = 2
"""Images in the example: torch.export takes a batch of 1 for a constant."""

RANDOM = ("rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal", "uniform", "exponential")
"""Operators that draw random numbers, less their _like; dropout is known to be the identity when it is deployed."""

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_ALIASES = ("contiguous", "clone", "detach", "alias", "lift_fresh_copy", "lift_fresh", "_assert_tensor_metadata")


@dataclass
class Trace:
    """A traced model.

    nodes: what computes a tensor from the pixels, or of the batch's size, in execution order.
    pixels: the node of the normalised image. output: the node of the logits.
    constants: every other tensor by its node, parameters and buffers and what is computed from these alone.
    trainable: those constants that depend on a parameter. names: dotted names of parameters and buffers.
    """

    model: nn.Module
    pixels: fx.Node
    output: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    constants: dict[fx.Node, Any] = field(default_factory=dict)
    trainable: set[fx.Node] = field(default_factory=set)
    names: dict[fx.Node, str] = field(default_factory=dict)

    @property
    def batch(self) -> Any:
        """The symbol that stands for the number of images."""
        return shape_of(self.pixels)[0]

    def constant(self, argument: Any) -> Any:
        """The value of an argument that no pixel reaches: a number, a list, or a tensor. Raises KeyError for others."""
        if isinstance(argument, list | tuple):
            return type(argument)(self.constant(item) for item in argument)
        return self.constants[argument] if isinstance(argument, fx.Node) else argument


def trace(model: nn.Module, spec: InputSpec) -> Trace:
    """Trace a copy of a float classifier in evaluation mode, with a free batch size.

    model: takes normalised float32 [N, C, H, W]. Raises TrainingError naming the line of the model's code that cannot
    be traced, and what to do about it.
    """
    model = own_copy(model)
    require_one_input(model)
    image = torch.zeros(EXAMPLE_BATCH, spec.channels, spec.height, spec.width)
    program = export_graph(model, image)
    graph = program.graph_module.graph
    pixels = next(node for node in graph.nodes if node.name == program.graph_signature.user_inputs[0])
    result = Trace(model, pixels, _logits(program, graph))
    _read_tensors(program, result)
    _sort_nodes(graph, result)
    _make_functional(result)
    result.output = _forget_aliases(result)
    _keep_what_is_needed(result)
    for node in result.nodes:
        _require_plain(node)
    return result


def where(node: fx.Node) -> str:
    """Module path of the code that makes a node, "" for the model itself."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    path = stack[-1] if stack else ""
    return "" if path.startswith("_empty") else path.split("@")[0]


def line_of(node: fx.Node) -> str:
    """Place in the user's code that makes a node, as file:line, "" where torch did not keep it."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    theirs = [(file, number) for file, number in frames if not is_not_the_users(file)]
    return f"{Path(theirs[-1][0]).name}:{theirs[-1][1]}" if theirs else ""


def place_of(node: fx.Node) -> str:
    """Module path and line of the code that makes a node, for errors."""
    path, line = where(node), line_of(node)
    return f"{path or node.name} ({line})" if line else path or node.name


def operator_name(node: fx.Node) -> str:
    """Name of a node's operator as PyTorch has it, such as layer_norm."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", getattr(node.target, "__name__", node.target)))


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a number from shapes, no tensor."""
    value = node.meta.get("val")
    return not isinstance(value, Tensor) and not isinstance(value, list | tuple)


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Shape of a node's value, its batch a symbol."""
    return tuple(node.meta["val"].shape)


def _read_tensors(program: torch.export.ExportedProgram, trace: Trace) -> None:
    signature = program.graph_signature
    targets = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    state = {**program.constants, **program.state_dict}
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder" and node.name in targets:
            trace.constants[node], trace.names[node] = state[targets[node.name]].detach(), targets[node.name]
            if node.name in signature.inputs_to_parameters:
                trace.trainable.add(node)


def _sort_nodes(graph: fx.Graph, trace: Trace) -> None:
    """Tell what the pixels reach from what they do not, and compute the latter now, in its order."""
    reached = {trace.pixels}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        sources = [] if _takes_only_type(node) else node.all_input_nodes
        sized = [source for source in node.all_input_nodes if source.op == "call_function" and is_size(source)]
        if is_size(node):
            continue
        if any(source in reached for source in sources) or sized:
            reached.add(node)
            trace.nodes.append(node)
        else:
            trace.constants[node] = _compute(node, trace)
            if any(source in trace.trainable for source in sources):
                trace.trainable.add(node)


def _compute(node: fx.Node, trace: Trace) -> Any:
    _require_plain(node)
    if _takes_only_type(node):
        arguments = [torch.empty(0, dtype=node.meta["val"].dtype), *trace.constant(list(node.args[1:]))]
    else:
        arguments = trace.constant(list(node.args))
    with torch.no_grad():
        return cast(Any, node.target)(*arguments, **{key: trace.constant(item) for key, item in node.kwargs.items()})


def _takes_only_type(node: fx.Node) -> bool:
    return operator_name(node) in ("new_zeros", "new_ones", "new_full", "new_empty")


def _make_functional(trace: Trace) -> None:
    """Let whoever reads a tensor after it was written in place read the writer's result."""
    order = {node: index for index, node in enumerate(trace.nodes)}
    for node in trace.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        written = node.args[0]
        assert isinstance(written, fx.Node)
        relatives = [other for other in _views_of(_base(written)) if other is not written]
        shared = any(order.get(user, 0) > order[node] for other in relatives for user in other.users)
        if shared or not operator_name(node).endswith("_"):
            raise TrainingError(
                f"{place_of(node)}: {operator_name(node)} writes in place into a tensor that another one shares; "
                "write out of place (torch.cat or torch.where build a changed copy)."
            )
        for user in list(written.users):
            if order.get(user, 0) > order[node] or user.op == "output":
                user.replace_input_with(written, node)
        if written is trace.output:
            trace.output = node


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return operator_name(node) == "getitem"
    return any(argument.alias_info is not None and not argument.alias_info.is_write for argument in schema.arguments)


def _views_of(node: fx.Node) -> list[fx.Node]:
    """A node, and everything that looks into its memory."""
    return [node, *(other for user in node.users if _is_view(user) for other in _views_of(user))]


def _base(node: fx.Node) -> fx.Node:
    source = node.args[0] if node.args else None
    return _base(source) if _is_view(node) and isinstance(source, fx.Node) else node


def _forget_aliases(trace: Trace) -> fx.Node:
    """Drop copies, and dropouts of nothing; returns what the output is then."""
    output = trace.output
    for node in list(trace.nodes):
        source = node.args[0] if node.args else None
        never_drops = operator_name(node).startswith("dropout") and node.args[1] == 0.0
        if (never_drops or operator_name(node) in _ALIASES) and isinstance(source, fx.Node):
            node.replace_all_uses_with(source)
            trace.nodes.remove(node)
            output = source if node is output else output
    return output


def _keep_what_is_needed(trace: Trace) -> None:
    needed, todo = set(), [trace.output]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    trace.nodes = [node for node in trace.nodes if node in needed]


def _require_plain(node: fx.Node) -> None:
    """Raise TrainingError for an operator whose result depends on chance, or whose size on values."""
    name = operator_name(node).rstrip("_")
    if name.removesuffix("_like") in RANDOM:
        raise TrainingError(
            f"{place_of(node)}: {name} draws random numbers in evaluation mode, so no two runs agree. Draw them only "
            "where self.training is true."
        )
    if _chooses_by_value(node):
        raise TrainingError(
            f"{place_of(node)}: how much {name} returns depends on the values of the image. Keep all positions "
            "(torch.where and a product with a mask do)."
        )


def _chooses_by_value(node: fx.Node) -> bool:
    """Whether a node returns as many values as fulfil a condition; "u" names sizes that only the image tells."""
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, Tensor) else ()
    if any(isinstance(size, torch.SymInt) and str(size).startswith("u") for size in sizes):
        return True
    indices = node.args[1] if operator_name(node) == "index" else ()
    masks = [i for i in indices if isinstance(i, fx.Node) and i.op == "call_function"]  # type: ignore[union-attr]
    return any(mask.meta["val"].dtype == torch.bool for mask in masks)


def _logits(program: torch.export.ExportedProgram, graph: fx.Graph) -> fx.Node:
    """The model's result: of a dict its "logits" or "out", else its only or first value; of a tuple the first."""
    output = next(node for node in graph.nodes if node.op == "output")
    structure = program.call_spec.out_spec
    assert structure is not None
    value = pytree.tree_unflatten(pytree.tree_leaves(output.args[0]), structure)
    while not isinstance(value, fx.Node):
        if isinstance(value, dict) and value:
            value = value.get("logits", value.get("out", next(iter(value.values()))))
        elif isinstance(value, list | tuple) and value:
            value = value[0]
        else:
            inner = pytree.tree_leaves(value)
            tensors = [leaf for leaf in inner if isinstance(leaf, fx.Node)]
            if not tensors:
                raise TrainingError(
                    "the model must return its logits, a tensor [N, classes] that depends on the image; "
                    f"it returns {type(value).__name__}."
                )
            value = tensors[0]
    shape = shape_of(value) if isinstance(value.meta.get("val"), Tensor) else ()
    if len(shape) != 2 or not isinstance(shape[0], torch.SymInt) or value.op != "call_function":
        listed = ", ".join("N" if isinstance(size, torch.SymInt) else str(size) for size in shape)
        raise TrainingError(
            f"the model must return its logits, [N, classes], first where it returns several; this is [{listed}]."
        )
    return value
