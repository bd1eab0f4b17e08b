"""Group the operators of a traced model into plans: one plan is one unit to be.

`operators.py` has one rule for each operator that an integer kernel computes. What has no rule, reads a float value, or
is listed under quant.float_layers, stays in float; `islands.py` gathers it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import fx, nn

from mecdeploy.training.arguments import arguments_of
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.islands import gather_islands
from mecdeploy.training.operators import REFUSED, RULES
from mecdeploy.training.plans import Plan, Plans, Value
from mecdeploy.training.rewrites import recognise_hard_sigmoids
from mecdeploy.training.tracing import Trace, operator_name, place_of, where

UNIT_PARTS = ("outputs", "output", "weight", "bias", "batch_norm", "weight_quantizer", "geometry", "frozen", "module")
"""What units call their own parts: no unit inside another's path has these names."""

NEVER_NEGATIVE = ("relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "_softmax", "softplus")
"""Float operators whose results need no sign."""


def plan_units(trace: Trace, float_layers: Sequence[str] = ()) -> Plans:
    """Plans of a traced float model.

    float_layers: name patterns (fnmatch) of operators that stay in float. Raises TrainingError for an operator with
    weights and no integer kernel that is not among them, and for a pattern that matches none.
    """
    recognise_hard_sigmoids(trace)
    return Planner(trace, float_layers).run()


class Planner:
    """What the rules work with: the plans so far, and the value of every node."""

    def __init__(self, trace: Trace, float_layers: Sequence[str]) -> None:
        self.trace, self.float_layers = trace, float_layers
        self.plans: list[Plan] = []
        self.values: dict[fx.Node, Value] = {trace.pixels: Value(codes=True)}
        self.floating: dict[fx.Node, str] = {}
        self._names: set[str] = set()
        self._nodes: dict[Value, list[fx.Node]] = {}
        self._deferred: set[fx.Node] = set()
        self._quantized: dict[Value, Value] = {}
        self._depths: dict[fx.Node, int] = {}
        self._needed = set(trace.nodes)
        self._seen: list[str] = []

    def run(self) -> Plans:
        """Visit every node, gather what stayed in float, finish the output."""
        for node in self.trace.nodes:
            self._visit(node)
        self._check_float_layers()
        self._keep_products_real()
        output = self._output()
        plans = gather_islands(self)
        assert output.plan is not None  # islands have been gathered
        return Plans(by_name={plan.name: plan for plan in plans}, output=output.plan.name, position=output.position)

    def _visit(self, node: fx.Node) -> None:
        operator = operator_name(node).rstrip("_")
        self._seen.append(self.name_of(node))
        if any(fnmatchcase(self.name_of(node), pattern) for pattern in self.float_layers):
            self.keep_float(node, "listed under quant.float_layers")
            return
        rule = RULES.get(operator)
        if rule is None:
            if operator in REFUSED:
                raise TrainingError(
                    f"{place_of(node)}: {operator} has no integer kernel ({REFUSED[operator]}). To keep it in float, "
                    f'list it: quant.float_layers = ["{self.name_of(node)}"].'
                )
            self.keep_float(node, f"{operator} has no integer kernel")
            return
        result = rule(self, node, arguments_of(node))
        if isinstance(result, Value):
            self.values[node] = result
            self._nodes.setdefault(result, []).append(node)
        elif isinstance(result, str):
            self.keep_float(node, result)
        else:
            self._deferred.add(node)

    def keep_float(self, node: fx.Node, reason: str) -> None:
        """Leave a node to the islands, and with it what had been left to its readers."""
        self._deferred.discard(node)
        for source in node.all_input_nodes:
            if source in self._deferred:
                self.keep_float(source, f"{operator_name(source)} has no integer kernel of its own")
        self.floating[node] = reason
        self.values[node] = Value(codes=False, node=node)

    def name_of(self, node: fx.Node) -> str:
        """Name of what a node computes, before it is made unique."""
        path, operator = where(node), operator_name(node).rstrip("_")
        weight = node.args[1] if operator in ("conv2d", "linear") and len(node.args) > 1 else None
        target = self.trace.names.get(weight) if isinstance(weight, fx.Node) else None
        layer = "" if target is None else target.removesuffix("weight").rstrip("._")
        if layer and layer != target:
            return layer
        return path if path and self._is_layer(path) else f"{path}.{operator}".lstrip(".")

    def _is_layer(self, path: str) -> bool:
        """Whether a module is one of torch's own without layers inside, or a kind of one: it names what it computes."""
        module = self.trace.model.get_submodule(path)
        own = type(module).__module__.startswith("torch.nn.modules.") or isinstance(module, nn.Conv2d | nn.Linear)
        return own and not any(True for _ in module.children())

    def add_plan(self, name: str, kind: str, inputs: Sequence[Value], **fields: Any) -> Value:
        """A new plan and the value it makes; the name is made unique."""
        unique, count = name, 2
        while unique in self._names or self._is_taken(unique):
            unique, count = f"{name}_{count}", count + 1
        self._names.add(unique)
        depth = 1 + max((self.depth(value) for value in inputs), default=0)
        plan = Plan(name=unique, kind=kind, inputs=list(inputs), depth=depth, **fields)
        self.plans.append(plan)
        return Value(codes=kind not in ("island", "dequantize"), plan=plan)

    def _is_taken(self, name: str) -> bool:
        """Whether a module cannot have a submodule of this name: a method is called so, or a part of its own unit."""
        parent, _, leaf = name.rpartition(".")
        return hasattr(nn.Module, leaf) or (leaf in UNIT_PARTS and parent in self._names)

    def depth(self, value: Value) -> int:
        """Units on the longest way from the pixels to a value."""
        return value.depth if value.node is None else self.depth_of(value.node)

    def depth_of(self, node: fx.Node) -> int:
        """The same for a node that stays in float: the deepest of what it reads."""
        if node not in self._depths:
            sources = [self.values[source] for source in node.all_input_nodes if source in self.values]
            self._depths[node] = max((self.depth(source) for source in sources), default=0)
        return self._depths[node]

    def read(self, argument: Any) -> Value | None:
        """The value of an argument that the pixels reach, else None."""
        if not isinstance(argument, fx.Node):
            return None
        if argument in self._deferred:
            self.keep_float(argument, f"{operator_name(argument)} has no integer kernel of its own")
        return self.values.get(argument)

    def seen_through(self, argument: Any, operators: Sequence[str]) -> Any:
        """An argument, or what it is made from where one of these operators was left to its readers to compute."""
        if argument in self._deferred and operator_name(argument) in operators:
            return argument.args[0]
        return argument

    def codes(self, argument: Any) -> Value | None:
        """The value of an argument if it is quantised, else None."""
        value = self.read(argument)
        return value if value is not None and value.codes else None

    def as_codes(self, value: Value) -> Value:
        """A value's codes; a float one is quantised once, for all its readers."""
        if value.codes:
            return value
        if value.plan is not None and value.plan.kind == "weighted":
            # Another layer reads these products: rounded once, by the kernel that makes them, for all.
            value.plan.float_output, value.codes = False, True
            return value
        if value not in self._quantized:
            node, made = value.node, value.plan
            signed = node is None or operator_name(node).rstrip("_") not in NEVER_NEGATIVE
            name = self.name_of(node) if node is not None else made.name if made is not None else "float"
            self._quantized[value] = self.add_plan(f"{name}_codes", "quantize", [value], options={"signed": signed})
        return self._quantized[value]

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that read a node's tensor, not only its shape."""
        return [user for user in node.users if user in self._needed]

    def is_read_once(self, argument: Any) -> bool:
        """Whether only one node reads an argument's value, so that this node may join the plan that makes it."""
        value = self.read(argument)
        nodes = [] if value is None else self._nodes.get(value, [])
        readers = {reader for node in nodes for reader in self.readers(node)}.difference(nodes)
        return len(readers) == 1 and self.trace.output not in nodes

    def _check_float_layers(self) -> None:
        for pattern in self.float_layers:
            if not any(fnmatchcase(name, pattern) for name in self._seen):
                close = difflib.get_close_matches(pattern, self._seen, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else f" There are: {', '.join(self._seen[:8])}, ..."
                raise TrainingError(f"quant.float_layers: {pattern!r} matches no operator.{hint}")

    def _keep_products_real(self) -> None:
        """Linear layers read only in float hand on their products, unrounded; there is no such kernel for Conv2d."""
        for plan in self.plans:
            if plan.kind != "weighted" or plan.layer is None or plan.layer.geometry is not None or plan.relu:
                continue
            values = [value for value in self.values.values() if value.plan is plan]
            nodes = {node for node, value in self.values.items() if value.plan is plan}
            readers = {reader for node in nodes for reader in self.readers(node)} - nodes
            in_float = all(reader in self.floating for reader in readers)
            if plan.batch_norm is None and in_float and (readers or self.trace.output in nodes):
                plan.float_output = True
                for value in values:
                    value.codes = False

    def _output(self) -> Value:
        value = self.read(self.trace.output)
        assert value is not None  # every node that is needed has been visited
        if value is self.values[self.trace.pixels]:
            raise TrainingError("the model returns the image; it must return its logits, [N, classes].")
        if not value.codes:
            return value
        return self.add_plan("dequantize", "dequantize", [value])
