"""One rule for each of PyTorch's operators that an integer kernel computes: node -> plan.

A rule gets the planner, the node and its arguments by name. It returns the Value that the node makes, or a sentence
that says why the node stays in float. Shapes hold no constant batch: the first axis is the batch's and stays in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from mecdeploy.training.geometry import Geometry, pair, same_padding, sides
from mecdeploy.training.plans import PASS_THROUGH, Layer, Value
from mecdeploy.training.tracing import operator_name, shape_of

if TYPE_CHECKING:
    from mecdeploy.training.planning import Planner

Arguments: TypeAlias = dict[str, Any]
Rule: TypeAlias = "Callable[[Planner, fx.Node, Arguments], Value | str | None]"

IN_FLOAT = "its input is float"
ACROSS_IMAGES = "it moves values across the axis of the images"

REFUSED = {
    "conv1d": "only two-dimensional convolutions have one",
    "conv3d": "only two-dimensional convolutions have one",
    "conv_transpose1d": "transposed convolutions have none",
    "conv_transpose2d": "transposed convolutions have none",
    "conv_transpose3d": "transposed convolutions have none",
    "bilinear": "its weights multiply two inputs",
    "lstm": "recurrent layers have none",
    "gru": "recurrent layers have none",
    "rnn_tanh": "recurrent layers have none",
    "rnn_relu": "recurrent layers have none",
    "embedding": "a classifier's image is no index",
}
"""Operators with weights that would silently stay in float, and why they have no kernel."""


def arguments_of(node: fx.Node) -> Arguments:
    """A node's arguments by the names of its operator's schema, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(node.kwargs)
    found: Arguments = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            found[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


def _constant(planner: Planner, argument: Any) -> Any:
    """A constant's value; None for none, and for what the pixels reach."""
    try:
        return None if argument is None else planner.trace.constant(argument)
    except KeyError:
        return None


# Layers with weights


def _conv2d(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x, weight = planner.read(a["input"]), _constant(planner, a["weight"])
    if x is None or not isinstance(weight, Tensor):
        return "its weight is computed from the image"
    kernel, dilation = (int(weight.shape[2]), int(weight.shape[3])), pair(a["dilation"])
    if a["padding"] == "same":
        padding = same_padding(kernel, dilation)
    else:
        padding = sides(0 if a["padding"] == "valid" else a["padding"])
    geometry = Geometry(stride=pair(a["stride"]), padding=padding, dilation=dilation, groups=int(a["groups"]))
    return _weighted(planner, node, x, Layer(weight=weight, bias=_constant(planner, a["bias"]), geometry=geometry))


def _linear(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x, weight = planner.read(a["input"]), _constant(planner, a["weight"])
    if x is None or not isinstance(weight, Tensor) or weight.dim() != 2:
        return "its weight is computed from the image"
    return _weighted(planner, node, x, Layer(weight=weight, bias=_constant(planner, a["bias"]), geometry=None))


def _matmul(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x, weight = planner.read(a["self"]), _constant(planner, a.get("other", a.get("mat2")))
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
    mean, variance = _constant(planner, a["running_mean"]), _constant(planner, a["running_var"])
    kind = nn.BatchNorm2d if rank == 4 else nn.BatchNorm1d
    norm = kind(len(mean), eps=float(a["eps"]), momentum=float(a["momentum"]) or None)
    with torch.no_grad():
        norm.running_mean.copy_(mean)  # type: ignore[union-attr]
        norm.running_var.copy_(variance)  # type: ignore[union-attr]
        for parameter, given in ((norm.weight, a["weight"]), (norm.bias, a["bias"])):
            if given is not None:
                parameter.copy_(_constant(planner, given))
    return norm.eval()


# Activations

_ABSORBS = ("weighted", "add", "average_pool", "global_average")


def _relu(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    return _rectify(planner, node, a, None)


def _relu6(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    return _rectify(planner, node, a, 6.0)


def _hardtanh(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    low, high = a.get("min_val", a.get("min")), a.get("max_val", a.get("max"))
    if low != 0 or not (high is None or (isinstance(high, int | float) and high > 0)):
        return f"{operator_name(node)} to {low}..{high} has no integer kernel; from 0 up it is a ReLU"
    return _rectify(planner, node, a, None if high is None else float(high))


def _rectify(planner: Planner, node: fx.Node, a: Arguments, maximum: float | None) -> Value | str:
    argument = a.get("self", a.get("input"))
    x = planner.codes(argument)
    if x is None:
        return IN_FLOAT
    plan = x.plan
    joins = plan is not None and (plan.kind in _ABSORBS or plan.options.get("function") == "mul")
    if plan is not None and joins and planner.is_read_once(argument):
        plan.relu = True
        plan.maximum = min((bound for bound in (plan.maximum, maximum) if bound is not None), default=None)
        return x
    # Somebody else reads the value too, or its maker hands on codes: a kernel of its own.
    return _elementwise(planner, node, "leaky_relu", [x], alpha=0.0, relu=True, maximum=maximum)


def _leaky_relu(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x, slope = planner.codes(a["self"]), float(a["negative_slope"])
    if x is None:
        return IN_FLOAT
    if not 0 <= slope < 1:
        return f"leaky_relu with slope {slope} has no integer kernel; slopes from 0 up to 1 have"
    return _elementwise(planner, node, "leaky_relu", [x], alpha=slope, relu=slope == 0)


def _sigmoid(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a["self"])
    return IN_FLOAT if x is None else _elementwise(planner, node, "sigmoid", [x], maximum=1.0)


def _hard_sigmoid(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a["self"])
    return IN_FLOAT if x is None else _elementwise(planner, node, "hard_sigmoid", [x], maximum=1.0)


def _silu(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    return _gated(planner, node, a, "sigmoid")


def _hardswish(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    return _gated(planner, node, a, "hard_sigmoid")


def _gated(planner: Planner, node: fx.Node, a: Arguments, gate: str) -> Value | str:
    """X * gate(x): two kernels."""
    x = planner.codes(a["self"])
    if x is None:
        return IN_FLOAT
    name = f"{planner.name_of(node)}_gate"
    factor = planner.add_plan(name, "elementwise", [x], options={"function": gate, "alpha": 0.0}, maximum=1.0)
    return _elementwise(planner, node, "mul", [x, factor])


def _elementwise(
    planner: Planner,
    node: fx.Node,
    function: str,
    inputs: Sequence[Value],
    *,
    alpha: float = 0.0,
    relu: bool = False,
    maximum: float | None = None,
) -> Value:
    options = {"function": function, "alpha": alpha}
    return planner.add_plan(planner.name_of(node), "elementwise", inputs, options=options, relu=relu, maximum=maximum)


# Two values


def _add(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    first, second = planner.codes(a["self"]), planner.codes(a["other"])
    if first is None or second is None:
        return "it adds a constant, or a float value"
    if a.get("alpha", 1) != 1:
        return f"add with alpha {a['alpha']} has no integer kernel; use a + b"
    if shape_of(a["self"]) != shape_of(a["other"]):
        return "it adds values of two shapes"
    return planner.add_plan(planner.name_of(node), "add", [first, second])


def _mul(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    first, second = planner.codes(a["self"]), planner.codes(a["other"])
    if first is None or second is None:
        return "it multiplies by a constant, or a float value"
    shapes = (shape_of(a["self"]), shape_of(a["other"]))
    if len(shapes[0]) != len(shapes[1]):
        return "it multiplies values of two ranks"
    return _elementwise(planner, node, "mul", [first, second])


# Pools


def _max_pool2d(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a["self"])
    if x is None:
        return IN_FLOAT
    kernel = pair(a["kernel_size"])
    geometry = Geometry(
        stride=pair(a["stride"]) if a["stride"] else kernel, padding=sides(a["padding"]), dilation=pair(a["dilation"])
    )
    options = {"kernel": kernel, "geometry": geometry, "ceil_mode": bool(a["ceil_mode"])}
    return planner.add_plan(planner.name_of(node), "max_pool", [x], options=options)


def _avg_pool2d(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a["self"])
    if x is None:
        return IN_FLOAT
    if a["ceil_mode"] or a["divisor_override"]:
        return "average pooling with ceil_mode or divisor_override has no integer kernel"
    kernel = pair(a["kernel_size"])
    stride = pair(a["stride"]) if a["stride"] else kernel
    return _average(planner, node, x, kernel, stride, pair(a["padding"]), bool(a["count_include_pad"]))


def _adaptive_avg_pool2d(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a["self"])
    if x is None:
        return IN_FLOAT
    size = tuple(int(extent) for extent in shape_of(a["self"])[-2:])
    wanted = pair(a["output_size"])
    if wanted == size:
        return x
    if size[0] % wanted[0] or size[1] % wanted[1]:
        return f"average pooling of {size} positions to {wanted} has windows of several sizes"
    kernel = (size[0] // wanted[0], size[1] // wanted[1])
    return _average(planner, node, x, kernel, kernel, (0, 0), True)


def _mean(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a["self"])
    rank = len(shape_of(a["self"]))
    if x is None:
        return IN_FLOAT
    if rank != 4 or sorted(axis % rank for axis in a.get("dim") or []) != [2, 3]:
        return "only a mean over height and width has an integer kernel"
    pooled = planner.add_plan(planner.name_of(node), "global_average", [x])
    return pooled if a["keepdim"] else _reshape_to(planner, node, pooled)


def _average(
    planner: Planner,
    node: fx.Node,
    x: Value,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    count_include_pad: bool,
) -> Value:
    if kernel == tuple(shape_of(node.args[0])[-2:]) and padding == (0, 0):  # type: ignore[arg-type]
        return planner.add_plan(planner.name_of(node), "global_average", [x])
    options = {"kernel": kernel, "stride": stride, "padding": padding, "count_include_pad": count_include_pad}
    return planner.add_plan(planner.name_of(node), "average_pool", [x], options=options)


# Movement of codes


def _reshape(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    source = a.get("self", a.get("input"))
    x = planner.codes(source)
    if x is None or not isinstance(source, fx.Node):
        return IN_FLOAT
    if str(shape_of(source)[0]) != str(planner.trace.batch):
        return ACROSS_IMAGES
    return _reshape_to(planner, node, x)


def _reshape_to(planner: Planner, node: fx.Node, x: Value) -> Value | str:
    batch, *sizes = shape_of(node)
    if str(batch) != str(planner.trace.batch) or any(not isinstance(size, int) for size in sizes):
        return ACROSS_IMAGES
    name = planner.name_of(node)
    if x.plan is not None and x.plan.name == name:
        name = f"{name}_flat"
    return planner.add_plan(name, "reshape", [x], options={"shape": tuple(sizes)})


def _permute(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    rank = len(shape_of(node))
    return _transposed(planner, node, a, [axis % rank for axis in a["dims"]])


def _transpose(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    rank = len(shape_of(node))
    axes = list(range(rank))
    first, second = (int(a[f"dim{i}"] if f"dim{i}" in a else a[f"axis{i}"]) % rank for i in (0, 1))
    axes[first], axes[second] = axes[second], axes[first]
    return _transposed(planner, node, a, axes)


def _transposed(planner: Planner, node: fx.Node, a: Arguments, axes: list[int]) -> Value | str:
    x = planner.codes(a["self"])
    if x is None:
        return IN_FLOAT
    if axes[0] != 0:
        return ACROSS_IMAGES
    return planner.add_plan(planner.name_of(node), "transpose", [x], options={"permutation": tuple(axes)})


def _slice(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    stop = a.get("end")
    return _cut(planner, node, a["self"], int(a["dim"]), a.get("start") or 0, stop, int(a["step"]))


def _narrow(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    if not isinstance(a["start"], int) or not isinstance(a["length"], int):
        return "its bounds depend on the image"
    return _cut(planner, node, a["self"], int(a["dim"]), a["start"], a["start"] + a["length"], 1)


def _select(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    axis, index = int(a["dim"]), a["index"]
    if not isinstance(index, int):
        return "its index depends on the image"
    size = shape_of(a["self"])[axis]
    index = index + size if index < 0 else index
    one = _cut(planner, node, a["self"], axis, index, index + 1, 1)
    return one if isinstance(one, str) else _reshape_to(planner, node, one)


def _cut(planner: Planner, node: fx.Node, source: Any, axis: int, start: Any, stop: Any, step: int) -> Value | str:
    x = planner.codes(source)
    if x is None:
        return IN_FLOAT
    shape = shape_of(source)
    axis %= len(shape)
    if axis == 0 or not isinstance(shape[axis], int) or not isinstance(start, int):
        return "it separates images of a batch"
    first, last, step = slice(start, stop, step).indices(shape[axis])
    if (first, last, step) == (0, shape[axis], 1):
        return x
    options = {"axis": axis, "start": first, "stop": last, "step": step}
    return planner.add_plan(planner.name_of(node), "slice", [x], options=options)


def _split(planner: Planner, node: fx.Node, a: Arguments) -> Value | str | None:
    """Chunk, split and unbind: their parts are cut where they are taken out."""
    if planner.codes(a["self"]) is None or int(a.get("dim", 0)) % len(shape_of(a["self"])) == 0:
        return IN_FLOAT
    return None


def _part(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    split, index = node.args[0], node.args[1]
    if not isinstance(split, fx.Node) or split in planner.floating or not isinstance(index, int):
        return IN_FLOAT
    given = arguments_of(split)
    axis = int(given.get("dim", 0)) % len(shape_of(given["self"]))
    parts = split.meta["val"]
    index %= len(parts)
    if operator_name(split) == "unbind":
        one = _cut(planner, node, given["self"], axis, index, index + 1, 1)
        return one if isinstance(one, str) else _reshape_to(planner, node, one)
    start = sum(int(part.shape[axis]) for part in parts[:index])
    return _cut(planner, node, given["self"], axis, start, start + int(parts[index].shape[axis]), 1)


def _cat(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    tensors = list(a["tensors"])
    values = [planner.codes(tensor) for tensor in tensors]
    known = [value for value in values if value is not None]
    axis = int(a["dim"]) % len(shape_of(node))
    if len(known) != len(values):
        return "it joins a constant or a float value"
    if axis == 0:
        return "it joins batches"
    if any(_is_pixels(value) for value in known):
        return "it joins raw pixels with other values"
    if len(known) == 1:
        return known[0]
    return planner.add_plan(planner.name_of(node), "concat", known, options={"axis": axis})


def _is_pixels(value: Value) -> bool:
    """Whether a value's codes are the image's own, whose scale nothing else can share."""
    if value.plan is None:
        return True
    return value.plan.kind in PASS_THROUGH and any(_is_pixels(source) for source in value.plan.inputs)


def _channel_shuffle(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a.get("self", a.get("input")))
    if x is None:
        return IN_FLOAT
    _, channels, height, width = shape_of(node)
    groups, name = int(a["groups"]), planner.name_of(node)
    split = planner.add_plan(name, "reshape", [x], options={"shape": (groups, channels // groups, height, width)})
    turned = planner.add_plan(name, "transpose", [split], options={"permutation": (0, 2, 1, 3, 4)})
    return planner.add_plan(name, "reshape", [turned], options={"shape": (channels, height, width)})


# Nothing to compute


def _dropout(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.read(a.get("input", a.get("self")))
    if x is None:
        return IN_FLOAT
    value = planner.add_plan(planner.name_of(node), "dropout", [x], options={"probability": float(a["p"])})
    value.codes = x.codes
    return value


def _cast(planner: Planner, node: fx.Node, a: Arguments) -> Value | str:
    x = planner.codes(a.get("self", a.get("input")))
    if x is None or node.meta["val"].dtype != torch.float32:
        return IN_FLOAT
    return x


RULES: dict[str, Rule] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "batch_norm": _batch_norm,
    "relu": _relu,
    "relu6": _relu6,
    "hardtanh": _hardtanh,
    "clamp": _hardtanh,
    "clamp_min": _hardtanh,
    "leaky_relu": _leaky_relu,
    "sigmoid": _sigmoid,
    "hardsigmoid": _hard_sigmoid,
    "silu": _silu,
    "hardswish": _hardswish,
    "add": _add,
    "mul": _mul,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "mean": _mean,
    "view": _reshape,
    "reshape": _reshape,
    "_unsafe_view": _reshape,
    "flatten": _reshape,
    "unflatten": _reshape,
    "squeeze": _reshape,
    "unsqueeze": _reshape,
    "permute": _permute,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "swapdims": _transpose,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "chunk": _split,
    "split": _split,
    "split_with_sizes": _split,
    "unbind": _split,
    "getitem": _part,
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "channel_shuffle": _channel_shuffle,
    "native_channel_shuffle": _channel_shuffle,
    "dropout": _dropout,
    "feature_dropout": _dropout,
    "to": _cast,
    "_to_copy": _cast,
}
