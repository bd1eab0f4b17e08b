"""Gather what stays in float into islands: plans of their own, each with one piece of the traced graph.

Operators that feed each other directly are one island, unless an integer unit lies between them on another way: then
the island would have to run before and after it. The number of units on the longest way from the pixels tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.plans import Plan, Value
from mecdeploy.training.tracing import Trace, is_size, operator_name, place_of, shape_of

if TYPE_CHECKING:
    from mecdeploy.training.planning import Planner


def gather_islands(planner: Planner) -> list[Plan]:
    """Turn planner.floating into island plans, and order all plans so that each reads what is made before it."""
    groups = _connected(planner)
    for nodes in groups:
        _add_island(planner, nodes)
    if not groups:
        return planner.plans
    position = {id(plan): index for index, plan in enumerate(planner.plans)}
    return sorted(planner.plans, key=lambda plan: (plan.depth, plan.kind == "island", position[id(plan)]))


def _connected(planner: Planner) -> list[list[fx.Node]]:
    """The floating nodes in groups, in their order; those that read no value at all go with whoever reads them."""
    group: dict[fx.Node, list[fx.Node]] = {}
    for node in planner.floating:
        if _reads_nothing(planner, node):
            continue
        merged = [node]
        for source in node.all_input_nodes:
            theirs = group.get(source)
            if theirs is not None and theirs is not merged and planner.depth_of(source) == planner.depth_of(node):
                merged = theirs + merged
        for member in merged:
            group[member] = merged
    order = {node: index for index, node in enumerate(planner.trace.nodes)}
    distinct = {id(nodes): sorted(set(nodes), key=order.__getitem__) for nodes in group.values()}
    return sorted(distinct.values(), key=lambda nodes: order[nodes[0]])


def _reads_nothing(planner: Planner, node: fx.Node) -> bool:
    """Whether a node depends on the batch size alone, as a class token that is expanded does."""
    return all(
        source not in planner.values or _reads_nothing_itself(planner, source) for source in node.all_input_nodes
    )


def _reads_nothing_itself(planner: Planner, node: fx.Node) -> bool:
    return node in planner.floating and _reads_nothing(planner, node)


def _add_island(planner: Planner, nodes: list[fx.Node]) -> None:
    inside = set(nodes)
    outputs = [
        node
        for node in nodes
        if node is planner.trace.output or any(reader not in inside for reader in planner.readers(node))
    ]
    module, inputs = _Copy(planner, nodes).module(outputs)
    reasons = [planner.floating[node] for node in nodes]
    first = next((node for node in nodes if not planner.floating[node].startswith("its input")), nodes[0])
    value = planner.add_plan(
        planner.name_of(first),
        "island",
        inputs,
        options={
            "module": module,
            "asks_for_batch_size": any(node.name == "pixels" for node in module.graph.find_nodes(op="placeholder")),
            "operators": tuple(dict.fromkeys(operator_name(node).rstrip("_") for node in nodes)),
            "reason": planner.floating[first] if reasons else "",
        },
        output_count=len(outputs),
    )
    assert value.plan is not None
    value.plan.depth = planner.depth_of(nodes[0])
    for position, node in enumerate(outputs):
        planner.values[node].plan, planner.values[node].position = value.plan, position


class _Copy:
    """Copies nodes of a trace into a graph of their own."""

    def __init__(self, planner: Planner, nodes: list[fx.Node]) -> None:
        self.planner, self.nodes, self.inside = planner, nodes, set(nodes)
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.inputs: dict[Value, fx.Node] = {}
        self.sizes: fx.Node | None = None
        for value in self._read():
            self.inputs[value] = self.graph.placeholder(f"input_{len(self.inputs)}")

    def module(self, outputs: list[fx.Node]) -> tuple[fx.GraphModule, list[Value]]:
        """The graph as a module, and the values that its arguments stand for."""
        if any(_needs_sizes(self.planner, node) for node in self.nodes):
            pixels = self.planner.values[self.planner.trace.pixels]
            first = next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(first) if first is not None else self.graph.inserting_after():
                self.sizes = self.graph.placeholder("pixels")
            self.inputs = {_SizeOf(pixels): self.sizes, **self.inputs}  # type: ignore[dict-item]
        for node in self.nodes:
            self._copy(node)
        self.graph.output(tuple(self.made[node] for node in outputs))
        values = [value.of if isinstance(value, _SizeOf) else value for value in self.inputs]
        return fx.GraphModule(self.root, self.graph), values

    def _read(self) -> list[Value]:
        found: dict[Value, None] = {}
        for node in self.nodes:
            for source in node.all_input_nodes:
                value = self.planner.values.get(source)
                outside = source not in self.inside and not _reads_nothing_itself(self.planner, source)
                if outside and value is not None:
                    found[value] = None
        return list(found)

    def _copy(self, node: fx.Node) -> fx.Node:
        if node in self.made:
            return self.made[node]
        value = self.planner.values.get(node)
        if node not in self.inside and value in self.inputs:
            self.made[node] = self.inputs[value]
        elif node in self.planner.trace.constants:
            self.made[node] = self._constant(node)
        elif operator_name(node) == "sym_size" and str(node.meta["val"]) == str(self.planner.trace.batch):
            assert self.sizes is not None
            self.made[node] = self.graph.call_function(torch.ops.aten.sym_size.int, (self.sizes, 0))
        elif node.op != "call_function":
            raise TrainingError(f"{place_of(node)}: {operator_name(node)} reads {node.name}, which no unit makes.")
        else:
            for source in node.all_input_nodes:
                self._copy(source)
            copied = self.graph.node_copy(node, lambda source: self.made[source])
            copied.target = _out_of_place(node)
            copied.meta = {}
            one_head = operator_name(node) == "scaled_dot_product_attention" and len(shape_of(node)) == 3
            self.made[node] = self._in_four_dimensions(node, copied) if one_head else copied
        return self.made[node]

    def _in_four_dimensions(self, node: fx.Node, copied: fx.Node) -> fx.Node:
        """Attention without an axis of heads, given one: torch.onnx writes no other."""
        for source in node.all_input_nodes:
            if len(shape_of(source)) == 3:
                with self.graph.inserting_before(copied):
                    one = self.graph.call_function(torch.ops.aten.unsqueeze.default, (self.made[source], 1))
                copied.replace_input_with(self.made[source], one)
        return self.graph.call_function(torch.ops.aten.squeeze.dim, (copied, 1))

    def _constant(self, node: fx.Node) -> fx.Node:
        trace: Trace = self.planner.trace
        tensor = trace.constants[node]
        if not isinstance(tensor, Tensor):
            raise TrainingError(f"{place_of(node)}: {operator_name(node)} makes {type(tensor).__name__}, no tensor.")
        name = trace.names.get(node, node.name).replace(".", "_")
        tensor = tensor.detach().clone()
        if node in trace.trainable and tensor.is_floating_point():
            self.root.register_parameter(name, nn.Parameter(tensor))
        else:
            self.root.register_buffer(name, tensor)
        return self.graph.get_attr(name)


class _SizeOf:
    """Stands for the pixels as an argument of which only the size is read."""

    def __init__(self, of: Value) -> None:
        self.of = of


def _needs_sizes(planner: Planner, node: fx.Node) -> bool:
    """Whether a node, or one that is copied along with it, reads the number of images."""
    computed = [source for source in node.all_input_nodes if source.op == "call_function"]
    return any(
        is_size(source) or (_reads_nothing_itself(planner, source) and _needs_sizes(planner, source))
        for source in computed
    )


def _out_of_place(node: fx.Node) -> Any:
    """A node's operator, or the one that neither writes into its input nor asks how that lies in memory."""
    target = cast(Any, node.target)
    name = operator_name(node)
    if name == "view":
        return torch.ops.aten.reshape.default
    if not name.endswith("_") or not hasattr(torch.ops.aten, name.rstrip("_")):
        return target
    packet = getattr(torch.ops.aten, name.rstrip("_"))
    return getattr(packet, target._overloadname, target)
