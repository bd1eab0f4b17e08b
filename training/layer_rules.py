"""Rules for layers with weights: convolution, linear layer, BatchNorm."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from mecdeploy.training.arguments import IN_FLOAT, Arguments, Rule, constant
from mecdeploy.training.geometry import Geometry, pair, same_padding, sides
from mecdeploy.training.plans import Layer, Value
from mecdeploy.training.tracing import operator_name, shape_of

if TYPE_CHECKING:
    from mecdeploy.training.planning import Planner


def _conv2d(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    image = planner.seen_through(a["input"], ("pad",))
    x, weight = planner.read(image), constant(planner, a["weight"])
    if x is None or not isinstance(weight, Tensor):
        return "its weight is computed from the image"
    kernel, dilation = (int(weight.shape[2]), int(weight.shape[3])), pair(a["dilation"])
    if a["padding"] == "same":
        padding = same_padding(kernel, dilation)
    else:
        padding = sides(0 if a["padding"] == "valid" else a["padding"])
    if image is not a["input"]:
        left, right, top, bottom = a["input"].args[1]
        padding = (padding[0] + top, padding[1] + left, padding[2] + bottom, padding[3] + right)
    geometry = Geometry(stride=pair(a["stride"]), padding=padding, dilation=dilation, groups=int(a["groups"]))
    return _weighted(planner, node, x, Layer(weight=weight, bias=constant(planner, a["bias"]), geometry=geometry))


def _pad(planner: Planner, node: fx.Node, a: Arguments) -> Value | str | None:
    """Zeros around an image: left to the convolution that reads it."""
    if planner.codes(a["self"]) is None:
        return IN_FLOAT
    zeros = a["mode"] == "constant" and not a["value"]
    if zeros and len(a["pad"]) == 4 and all(isinstance(side, int) and side >= 0 for side in a["pad"]):
        return None
    return "only padding height and width with zeros, before a convolution, has an integer kernel"


def _linear(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x, weight = planner.read(a["input"]), constant(planner, a["weight"])
    if x is None or not isinstance(weight, Tensor) or weight.dim() != 2:
        return "its weight is computed from the image"
    return _weighted(planner, node, x, Layer(weight=weight, bias=constant(planner, a["bias"]), geometry=None))


def _matmul(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x, weight = planner.read(a["self"]), constant(planner, a.get("other", a.get("mat2")))
    if x is None or not isinstance(weight, Tensor) or weight.dim() != 2:
        return f"{operator_name(node)} of two values has no integer kernel"
    return _weighted(planner, node, x, Layer(weight=weight.t().contiguous(), bias=None, geometry=None))


def _weighted(planner: Planner, node: fx.Node, x: Value, layer: Layer) -> Value:
    value = planner.add_plan(planner.name_of(node), "weighted", [planner.as_codes(x)], layer=layer)
    if layer.geometry is None and len(shape_of(node)) > 2 and not _is_rectified(planner, node):
        # The layers of transformers, between float operators: their products are handed on unrounded.
        assert value.plan is not None
        value.plan.float_output, value.codes = True, False
    return value


def _is_rectified(planner: Planner, node: fx.Node) -> bool:
    readers = planner.readers(node)
    return len(readers) == 1 and operator_name(readers[0]).rstrip("_") in ("relu", "relu6", "hardtanh", "clamp_min")


def _batch_norm(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a["input"])
    if x is None:
        return IN_FLOAT
    if a["running_mean"] is None:
        return "a BatchNorm without running statistics has no fixed scale"
    rank = len(shape_of(node))
    norm = _as_module(planner, node, a, rank)
    plan = x.plan
    if (
        plan is not None
        and plan.kind == "weighted"
        and plan.batch_norm is None
        and not plan.relu
        and planner.is_read_once(a["input"])
        and rank == (2 if plan.layer is not None and plan.layer.geometry is None else 4)
    ):
        plan.batch_norm = norm
        return x
    if rank != 4 or not isinstance(norm, nn.BatchNorm2d):
        return "a BatchNorm of vectors becomes part of the linear layer right before it, or stays in float"
    # No layer to fold into: a depthwise 1x1 convolution, whose weight is 1 in each channel.
    channels = norm.num_features
    geometry = Geometry(stride=(1, 1), padding=(0, 0, 0, 0), groups=channels)
    layer = Layer(weight=torch.ones(channels, 1, 1, 1), bias=None, geometry=geometry)
    options = {"affine": True}
    return planner.add_plan(planner.name_of(node), "weighted", [x], layer=layer, batch_norm=norm, options=options)


def _as_module(planner: Planner, node: fx.Node, a: Arguments, rank: int) -> nn.BatchNorm2d | nn.BatchNorm1d:
    mean, variance = constant(planner, a["running_mean"]), constant(planner, a["running_var"])
    kind = nn.BatchNorm2d if rank == 4 else nn.BatchNorm1d
    norm = kind(len(mean), eps=float(a["eps"]), momentum=float(a["momentum"]) or None)
    with torch.no_grad():
        norm.running_mean.copy_(mean)  # type: ignore[union-attr]
        norm.running_var.copy_(variance)  # type: ignore[union-attr]
        for parameter, given in ((norm.weight, a["weight"]), (norm.bias, a["bias"])):
            if given is not None:
                parameter.copy_(constant(planner, given))
    return norm.eval()


LAYERS: Mapping[str, Rule] = MappingProxyType(
    {
        "conv2d": _conv2d,
        "pad": _pad,
        "linear": _linear,
        "matmul": _matmul,
        "mm": _matmul,
        "batch_norm": _batch_norm,
    }
)
