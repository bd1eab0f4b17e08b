"""Group the nodes of a traced model into plans: one plan is one unit to be.

A plan starts at an anchor (convolution, linear layer, addition, pooling, flatten, dropout) and absorbs the BatchNorm
and the activation that follow it. What is neither an anchor nor absorbed has no integer kernel here and is refused by
name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from mecdeploy.training.errors import TrainingError

PIXELS = "pixels"
"""Name of the value that holds the raw input."""

PASS_THROUGH = ("max_pool", "flatten", "dropout")
"""Kinds whose output keeps the quantisation of their input."""


@dataclass(kw_only=True)
class Plan:
    """A unit to be.

    name: module path of the anchor, or of the module that calls the anchor function plus the function's name.
    kind: weighted, add, average_pool, max_pool, flatten or dropout. layer: the anchor module, for weighted and pools.
    reads: names of plans, or PIXELS. maximum: 6 after ReLU6.
    """

    name: str
    kind: str
    reads: tuple[str, ...]
    layer: nn.Module | None = None
    batch_norm: nn.BatchNorm2d | None = None
    relu: bool = False
    maximum: float | None = None


@dataclass(frozen=True)
class Plans:
    """All plans in execution order, by name, and the name of the one whose value the model returns."""

    by_name: dict[str, Plan]
    output: str

    def readers(self, name: str) -> list[Plan]:
        """The plans that read `name`, seen through those that pass codes on unchanged."""
        found: list[Plan] = []
        for plan in self.by_name.values():
            if name in plan.reads:
                found += self.readers(plan.name) if plan.kind in PASS_THROUGH else [plan]
        return found

    def signed(self, name: str) -> bool:
        """Whether the value has both signs."""
        plan = self.by_name.get(name)
        if plan is None or plan.kind in ("weighted", "add"):
            return plan is None or not plan.relu
        return not plan.relu and self.signed(plan.reads[0])


def plan_units(traced: fx.GraphModule) -> Plans:
    """Plans of a traced float model; TrainingError names the first node that has no unit."""
    return _Planner(traced).run()


class _Planner:
    def __init__(self, traced: fx.GraphModule) -> None:
        self.traced = traced
        self.plans: dict[str, Plan] = {}
        self.source: dict[fx.Node, str] = {}

    def run(self) -> Plans:
        output = ""
        for node in self.traced.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "output":
                output = self._output(node)
            elif not _is_shape_query(node):
                self._visit(node)
        return Plans(self.plans, output)

    def _visit(self, node: fx.Node) -> None:
        module = self.traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        rule = MODULE_RULES.get(type(module)) if module is not None else FUNCTION_RULES.get(node.target)
        if rule is None:
            raise TrainingError(
                f"{self.where(node)}: {_operator_name(node, module)} has no integer unit; known are convolution, "
                "BatchNorm and ReLU/ReLU6 after it, linear, add, max and global average pooling, flatten, dropout. "
                "Rewrite the layer with these."
            )
        if not node.args:
            raise TrainingError(f"{self.where(node)}: its input is a keyword argument; pass it by position.")
        rule(self, node, module)

    def _placeholder(self, node: fx.Node) -> None:
        if self.source:
            raise TrainingError(f"the model has a second input, {node.name!r}; a classifier takes one image tensor.")
        self.source[node] = PIXELS

    def _output(self, node: fx.Node) -> str:
        value = node.args[0]
        plan = self.plans.get(self.source.get(value, "")) if isinstance(value, fx.Node) else None
        if plan is None or not isinstance(plan.layer, nn.Linear) or plan.relu:
            raise TrainingError("the model must return the output of a Linear layer, its logits; end it with one.")
        if any(plan.name in other.reads for other in self.plans.values()):
            raise TrainingError(f"{plan.name}: the logits are read again inside the model; return them only.")
        return plan.name

    def where(self, node: fx.Node) -> str:
        """Module path of the code that holds a node, for names and errors."""
        if node.op == "call_module":
            return str(node.target)
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        return f"{path}.{node.name}" if path else node.name

    def anchor(self, node: fx.Node, kind: str, inputs: tuple[Any, ...], layer: nn.Module | None = None) -> Plan:
        """Start a plan at a node."""
        reads = tuple(self.read(node, value) for value in inputs)
        name = self.where(node) if node.op == "call_module" else self._function_name(node, kind)
        if name in self.plans:
            raise TrainingError(f"{name} is called twice; give every call a layer of its own, to learn its own scales.")
        plan = Plan(name=name, kind=kind, reads=reads, layer=layer)
        self.plans[name] = plan
        self.source[node] = name
        return plan

    def _function_name(self, node: fx.Node, kind: str) -> str:
        path = self.where(node).removesuffix(node.name)
        name, count = f"{path}{kind}", 2
        while name in self.plans:
            name, count = f"{path}{kind}_{count}", count + 1
        return name

    def read(self, node: fx.Node, value: object) -> str:
        """Name of the value that a node reads."""
        if not isinstance(value, fx.Node) or value not in self.source:
            raise TrainingError(f"{self.where(node)} reads {value!r}, which is no activation; pass tensors only.")
        return self.source[value]

    def absorb(self, node: fx.Node) -> Plan | None:
        """The plan that a following node joins; None if its value is also read without that node."""
        name = self.read(node, node.args[0])
        # Every node so far that stands for the plan's value: what it absorbed, and identities in between.
        alone = all(len(_readers(alias)) == 1 for alias, source in self.source.items() if source == name)
        self.source[node] = name
        return self.plans.get(name) if alone else None


Rule = Callable[[_Planner, fx.Node, Any], None]


def _weighted(planner: _Planner, node: fx.Node, layer: Any) -> None:
    if isinstance(layer, nn.Conv2d) and (isinstance(layer.padding, str) or layer.padding_mode != "zeros"):
        raise TrainingError(
            f"{node.target}: padding {layer.padding!r} ({layer.padding_mode}) has no integer kernel; use numeric zeros."
        )
    planner.anchor(node, "weighted", (node.args[0],), layer)


def _batch_norm(planner: _Planner, node: fx.Node, layer: Any) -> None:
    plan = planner.absorb(node)
    if plan is None or not isinstance(plan.layer, nn.Conv2d) or plan.batch_norm is not None or plan.relu:
        raise TrainingError(
            f"{node.target}: a BatchNorm2d folds only into the convolution right before it; reorder the layers."
        )
    if any(other.batch_norm is layer for other in planner.plans.values()):
        raise TrainingError(f"{node.target} is called twice; give every convolution a BatchNorm2d of its own.")
    if not layer.affine or not layer.track_running_stats:
        raise TrainingError(f"{node.target}: BatchNorm2d needs affine=True and track_running_stats=True to fold.")
    plan.batch_norm = layer


def _relu(planner: _Planner, node: fx.Node, layer: Any) -> None:
    plan = planner.absorb(node)
    six = isinstance(layer, nn.ReLU6) or node.target is F.relu6
    if plan is None or plan.kind in PASS_THROUGH:
        raise TrainingError(
            f"{planner.where(node)}: a ReLU becomes part of the convolution, linear layer or addition right before it, "
            "whose value nothing else may read; reorder the layers."
        )
    plan.relu, plan.maximum = True, 6.0 if six else plan.maximum


def _add(planner: _Planner, node: fx.Node, _: Any) -> None:
    if node.kwargs:
        raise TrainingError(f"{planner.where(node)}: add with {sorted(node.kwargs)} has no integer kernel; use a + b.")
    target = node.args[0]
    in_place = node.target in (operator.iadd, "add_") and isinstance(target, fx.Node)
    if in_place and any(reader > node for reader in _readers(cast(fx.Node, target))):
        raise TrainingError(f"{planner.where(node)}: adds in place to a value that is read again later; use a + b.")
    planner.anchor(node, "add", node.args[:2])


def _average_pool(planner: _Planner, node: fx.Node, layer: Any) -> None:
    size = layer.output_size if layer is not None else node.args[1]
    if size not in (1, (1, 1), [1, 1]):
        raise TrainingError(
            f"{planner.where(node)}: average pooling to {size} has no integer unit; only global pooling (1) has."
        )
    planner.anchor(node, "average_pool", (node.args[0],))


def _max_pool(planner: _Planner, node: fx.Node, layer: Any) -> None:
    if layer is None:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        arguments: dict[str, Any] = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
        layer = nn.MaxPool2d(**{name: arguments[name] for name in names if name in arguments})
    planner.anchor(node, "max_pool", (node.args[0],), layer)


def _flatten(planner: _Planner, node: fx.Node, layer: Any) -> None:
    if layer is not None:
        keeps_batch = (layer.start_dim, layer.end_dim) == (1, -1)
    elif node.target in ("view", "reshape"):
        keeps_batch = len(node.args) == 3 and _is_batch_size(node.args[1]) and bool(node.args[2] == -1)
    else:
        bounds = {"start_dim": 0, "end_dim": -1, **dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False))}
        keeps_batch = {**bounds, **node.kwargs} == {"start_dim": 1, "end_dim": -1}
    if not keeps_batch:
        raise TrainingError(f"{planner.where(node)}: only flatten(x, 1), which keeps the batch, has an integer unit.")
    planner.anchor(node, "flatten", (node.args[0],))


def _dropout(planner: _Planner, node: fx.Node, layer: Any) -> None:
    planner.anchor(node, "dropout", (node.args[0],), layer or nn.Dropout(float(cast(float, node.kwargs.get("p", 0.5)))))


def _identity(planner: _Planner, node: fx.Node, _: Any) -> None:
    planner.source[node] = planner.read(node, node.args[0])


MODULE_RULES: dict[type, Rule] = {
    nn.Conv2d: _weighted,
    nn.Linear: _weighted,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: _relu,
    nn.ReLU6: _relu,
    nn.AdaptiveAvgPool2d: _average_pool,
    nn.MaxPool2d: _max_pool,
    nn.Flatten: _flatten,
    nn.Dropout: _dropout,
    nn.Identity: _identity,
}

FUNCTION_RULES: dict[Any, Rule] = {
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    "add": _add,
    "add_": _add,
    F.relu: _relu,
    torch.relu: _relu,
    F.relu6: _relu,
    "relu": _relu,
    "relu_": _relu,
    F.adaptive_avg_pool2d: _average_pool,
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    torch.flatten: _flatten,
    "flatten": _flatten,
    "view": _flatten,
    "reshape": _flatten,
    F.dropout: _dropout,
}


def _is_shape_query(node: fx.Node) -> bool:
    """x.size(0) and x.shape[0], which only a view reads."""
    if node.op == "call_method" and node.target == "size":
        return True
    if node.op == "call_function" and node.target is getattr:
        return bool(node.args[1] == "shape")
    indexes = node.op == "call_function" and node.target is operator.getitem
    return indexes and _is_shape_query(cast(fx.Node, node.args[0]))


def _is_batch_size(value: object) -> bool:
    """x.size(0), x.size()[0] and x.shape[0]."""
    return isinstance(value, fx.Node) and _is_shape_query(value) and value.args[1:] == (0,)


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a value, not only its shape."""
    return [user for user in node.users if not _is_shape_query(user)]


def _operator_name(node: fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        return type(module).__name__
    return str(getattr(node.target, "__name__", node.target))
