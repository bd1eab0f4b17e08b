"""Which units small hand-written modules become, and by which words the others are refused."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.patterns import Plans, plan_units


class Classifier(nn.Module):
    """Layers by name, and a forward given as a function of the module and the image."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.body = forward

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def conv(*, inputs: int = 4, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, 4, 3, padding=1, bias=bias)


def plans_of(forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> Plans:
    standard = {"conv": conv(inputs=3), "fc": nn.Linear(4, 5)}
    return plan_units(fx.symbolic_trace(Classifier(forward, **{**standard, **layers})))


def table(plans: Plans) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(plan.name, plan.kind, plan.reads) for plan in plans.by_name.values()]


def pooled(module: Any, x: Tensor) -> Tensor:
    logits: Tensor = module.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
    return logits


TAIL = [("average_pool", "average_pool"), ("flatten", "flatten"), ("fc", "weighted")]


def with_tail(*rows: tuple[str, str, tuple[str, ...]]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Rows, and those of `pooled` behind the last."""
    result, last = list(rows), rows[-1][0]
    for name, kind in TAIL:
        result.append((name, kind, (last,)))
        last = name
    return result


def relu_after_a_shape_query(m: Any, x: Tensor) -> Tensor:
    x.size(0)
    return F.relu(x)


RELUS: dict[str, tuple[Callable[[Any, Tensor], Tensor], float | None]] = {
    "module": (lambda m, x: m.relu(x), None),
    "module called twice": (lambda m, x: m.relu(m.relu(x)), None),
    "F.relu": (lambda m, x: F.relu(x), None),
    "F.relu in place": (lambda m, x: F.relu(x, inplace=True), None),
    "torch.relu": (lambda m, x: torch.relu(x), None),
    "method": (lambda m, x: x.relu(), None),
    "method in place": (lambda m, x: x.relu_(), None),
    "ReLU6": (lambda m, x: m.relu6(x), 6.0),
    "F.relu6": (lambda m, x: F.relu6(x), 6.0),
    "ReLU6 after ReLU": (lambda m, x: m.relu6(m.relu(x)), 6.0),
    "ReLU after ReLU6": (lambda m, x: m.relu(m.relu6(x)), 6.0),
    "through Identity": (lambda m, x: m.relu(m.identity(x)), None),
    "after a shape query": (relu_after_a_shape_query, None),
}


@pytest.mark.parametrize("kind", RELUS)
def test_a_relu_joins_the_unit_before_it(kind: str) -> None:
    relu, maximum = RELUS[kind]
    bn = nn.BatchNorm2d(4)
    plans = plans_of(
        lambda m, x: pooled(m, relu(m, m.bn(m.conv(x)))),
        bn=bn,
        relu=nn.ReLU(inplace=True),
        relu6=nn.ReLU6(),
        identity=nn.Identity(),
    )
    assert table(plans) == with_tail(("conv", "weighted", ("pixels",)))
    plan = plans.by_name["conv"]
    assert (plan.relu, plan.maximum) == (True, maximum)
    assert plan.batch_norm is not None and plan.batch_norm.num_features == 4
    assert not plans.signed("conv") and not plans.signed("average_pool")


ADDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a + b": operator.add,
    "a += b": operator.iadd,
    "torch.add": torch.add,
    "method": lambda a, b: a.add(b),
    "method in place": lambda a, b: a.add_(b),
}


@pytest.mark.parametrize("kind", ADDS)
@pytest.mark.parametrize("relu", [False, True])
def test_additions(kind: str, relu: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        total = ADDS[kind](m.second(y), y)
        return pooled(m, F.relu(total) if relu else total)

    plans = plans_of(forward, second=conv())
    assert table(plans) == with_tail(
        ("conv", "weighted", ("pixels",)), ("second", "weighted", ("conv",)), ("add", "add", ("second", "conv"))
    )
    assert plans.by_name["add"].relu == relu
    assert plans.signed("add") != relu
    assert plans.signed("conv") and plans.signed("second")


def test_an_addition_in_place_may_follow_other_readers() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        z = m.second(y)
        y += z
        return pooled(m, y)

    assert table(plans_of(forward, second=conv()))[2] == ("add", "add", ("conv", "second"))


def test_function_names_carry_the_module_that_calls_and_a_number() -> None:
    block = Classifier(lambda m, x: (lambda y: m.b(y) + y + x)(m.a(x)), a=conv(), b=conv())
    plans = plans_of(lambda m, x: pooled(m, m.block(m.conv(x))), block=block)
    assert table(plans) == with_tail(
        ("conv", "weighted", ("pixels",)),
        ("block.a", "weighted", ("conv",)),
        ("block.b", "weighted", ("block.a",)),
        ("block.add", "add", ("block.b", "block.a")),
        ("block.add_2", "add", ("block.add", "conv")),
    )


FLATTENS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "module": lambda m, x: m.flatten(x),
    "torch.flatten": lambda m, x: torch.flatten(x, 1),
    "torch.flatten by keyword": lambda m, x: torch.flatten(x, start_dim=1),
    "both dimensions": lambda m, x: torch.flatten(x, 1, -1),
    "method": lambda m, x: x.flatten(1),
    "view of size": lambda m, x: x.view(x.size(0), -1),
    "view of shape": lambda m, x: x.view(x.shape[0], -1),
    "reshape": lambda m, x: x.reshape(x.size()[0], -1),
}


@pytest.mark.parametrize("kind", FLATTENS)
def test_flattens(kind: str) -> None:
    plans = plans_of(
        lambda m, x: m.fc(FLATTENS[kind](m, m.pool(m.conv(x)))), flatten=nn.Flatten(), pool=nn.MaxPool2d(2)
    )
    assert table(plans) == [
        ("conv", "weighted", ("pixels",)),
        ("pool", "max_pool", ("conv",)),
        ("flatten", "flatten", ("pool",)),
        ("fc", "weighted", ("flatten",)),
    ]


AVERAGES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "average_pool": lambda m, x: F.adaptive_avg_pool2d(x, (1, 1)),
    "pool": lambda m, x: m.pool(x),
    "tuple": lambda m, x: m.tuple(x),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_global_averages(name: str) -> None:
    plans = plans_of(
        lambda m, x: m.fc(torch.flatten(AVERAGES[name](m, m.conv(x)), 1)),
        pool=nn.AdaptiveAvgPool2d(1),
        tuple=nn.AdaptiveAvgPool2d((1, 1)),
    )
    assert table(plans)[1] == (name, "average_pool", ("conv",))
    assert plans.signed(name)


def test_max_pool_functions_keep_their_arguments() -> None:
    plans = plans_of(lambda m, x: pooled(m, F.max_pool2d(m.conv(x), 3, stride=2, padding=1, ceil_mode=True)))
    layer = plans.by_name["max_pool"].layer
    assert isinstance(layer, nn.MaxPool2d)
    assert (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode) == (3, 2, 1, 1, True)


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout(p: float) -> None:
    for forward in (
        lambda m, x: m.drop(x),
        lambda m, x: F.dropout(x, p),
        lambda m, x: F.dropout(x, p=p, training=m.training),
    ):
        plans = plans_of(lambda m, x, forward=forward: pooled(m, forward(m, m.conv(x))), drop=nn.Dropout(p))
        (plan,) = (plan for plan in plans.by_name.values() if plan.kind == "dropout")
        assert isinstance(plan.layer, nn.Dropout) and plan.layer.p == p


def test_two_linears_and_a_convolution_without_batch_norm() -> None:
    plans = plans_of(
        lambda m, x: m.fc(F.relu(m.hidden(torch.flatten(m.conv(x), 1)))),
        conv=conv(inputs=3, bias=True),
        hidden=nn.Linear(64, 4),
    )
    assert table(plans) == [
        ("conv", "weighted", ("pixels",)),
        ("flatten", "flatten", ("conv",)),
        ("hidden", "weighted", ("flatten",)),
        ("fc", "weighted", ("hidden",)),
    ]
    assert plans.output == "fc"
    assert plans.signed("flatten") and not plans.signed("hidden")


def test_identities_vanish() -> None:
    plans = plans_of(lambda m, x: m.i(pooled(m, m.i(m.conv(m.i(x))))), i=nn.Identity())
    assert table(plans) == with_tail(("conv", "weighted", ("pixels",)))


def test_readers_are_seen_through_what_passes_codes_on() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.drop(m.pool(m.conv(x)))
        return pooled(m, m.second(y) + y)

    plans = plans_of(forward, second=conv(), pool=nn.MaxPool2d(2), drop=nn.Dropout(0.1))
    assert {plan.name for plan in plans.readers("conv")} == {"second", "add"}
    assert [plan.name for plan in plans.readers("pixels")] == ["conv"]


def test_a_pool_of_pixels_has_both_signs() -> None:
    """Normalised pixels are negative below the mean; without their sign the pool would cut them off."""
    plans = plans_of(lambda m, x: pooled(m, m.conv(F.adaptive_avg_pool2d(x, 1))))
    assert plans.signed("average_pool") and plans.signed("pixels")


RELU_ELSEWHERE = "a ReLU becomes part of the convolution, linear layer or addition right before it, whose value nothing"


def read_before_and_after(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return pooled(m, F.relu(y) + y)


def read_around_an_identity(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return pooled(m, F.relu(m.identity(y)) + y)


def read_around_a_batch_norm(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return pooled(m, m.bn(y) + y)


def add_in_place_then_read(m: Any, x: Tensor) -> Tensor:
    """In torch the last sum reads what add_ has changed; a graph of values would read what was there before."""
    y = m.conv(x)
    z = m.second(y)
    return pooled(m, z.add_(y) + z)


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "a module without a unit": (
        lambda m, x: pooled(m, m.deep.act(m.conv(x))),
        "deep.act: Sigmoid has no integer unit; known are convolution",
    ),
    "a function without a unit": (lambda m, x: pooled(m, m.conv(x) * 2), "mul: mul has no integer unit"),
    "a method without a unit": (lambda m, x: m.fc(m.conv(x).mean((2, 3))), "mean: mean has no integer unit"),
    "a function in a block": (lambda m, x: pooled(m, m.block(m.conv(x))), "block.sigmoid: sigmoid has no integer unit"),
    "BatchNorm first": (
        lambda m, x: pooled(m, m.conv(m.bn3(x))),
        "bn3: a BatchNorm2d folds only into the convolution right before it; reorder the layers.",
    ),
    "BatchNorm after ReLU": (lambda m, x: pooled(m, m.bn(F.relu(m.conv(x)))), "bn: a BatchNorm2d folds only"),
    "BatchNorm after BatchNorm": (lambda m, x: pooled(m, m.other(m.bn(m.conv(x)))), "other: a BatchNorm2d folds only"),
    "BatchNorm after an addition": (
        lambda m, x: pooled(m, m.bn((lambda y: m.second(y) + y)(m.conv(x)))),
        "bn: a BatchNorm2d folds only",
    ),
    "BatchNorm read around": (read_around_a_batch_norm, "bn: a BatchNorm2d folds only"),
    "BatchNorm called twice": (
        lambda m, x: pooled(m, m.bn(m.second(m.bn(m.conv(x))))),
        "bn is called twice; give every convolution a BatchNorm2d of its own.",
    ),
    "BatchNorm without gamma": (
        lambda m, x: pooled(m, m.plain(m.conv(x))),
        "plain: BatchNorm2d needs affine=True and track_running_stats=True to fold.",
    ),
    "ReLU read around": (read_before_and_after, f"relu: {RELU_ELSEWHERE}"),
    "ReLU behind an Identity read around": (read_around_an_identity, f"relu: {RELU_ELSEWHERE}"),
    "ReLU of pixels": (lambda m, x: pooled(m, m.conv(F.relu(x))), f"relu: {RELU_ELSEWHERE}"),
    "ReLU after MaxPool": (lambda m, x: pooled(m, F.relu(F.max_pool2d(m.conv(x), 2))), f"relu: {RELU_ELSEWHERE}"),
    "layer called twice": (
        lambda m, x: pooled(m, m.second(m.second(m.conv(x)))),
        "second is called twice; give every call a layer of its own",
    ),
    "no Linear at the end": (
        lambda m, x: torch.flatten(F.adaptive_avg_pool2d(m.conv(x), 1), 1),
        "the model must return the output of a Linear layer, its logits; end it with one.",
    ),
    "ReLU of the logits": (lambda m, x: F.relu(pooled(m, m.conv(x))), "must return the output of a Linear layer"),
    "a tuple": (lambda m, x: (pooled(m, m.conv(x)), x), "must return the output of a Linear layer"),
    "a shape": (lambda m, x: x.size(0), "must return the output of a Linear layer"),
    "the image": (lambda m, x: x, "must return the output of a Linear layer"),
    "logits read again": (
        lambda m, x: (lambda y: (m.fc2(y), y)[1])(pooled(m, m.conv(x))),
        "fc: the logits are read again inside the model; return them only.",
    ),
    "flatten of the batch": (
        lambda m, x: m.fc(torch.flatten(m.conv(x))),
        "flatten: only flatten(x, 1), which keeps the batch, has an integer unit.",
    ),
    "flatten of height and width": (lambda m, x: m.fc(m.conv(x).flatten(2)), "flatten: only flatten(x, 1)"),
    "view of one row": (lambda m, x: m.fc(m.conv(x).view(1, -1)), "view: only flatten(x, 1)"),
    "view by channels": (lambda m, x: m.fc(m.conv(x).view(x.size(1), -1)), "view: only flatten(x, 1)"),
    "view by features": (lambda m, x: m.fc(m.conv(x).view(-1, 64)), "view: only flatten(x, 1)"),
    "average to 2 x 2": (
        lambda m, x: pooled(m, F.adaptive_avg_pool2d(m.conv(x), 2)),
        "adaptive_avg_pool2d: average pooling to 2 has no integer unit; only global pooling (1) has.",
    ),
    "padding by name": (
        lambda m, x: pooled(m, m.same(m.conv(x))),
        "same: padding 'same' (zeros) has no integer kernel; use numeric zeros.",
    ),
    "padding by reflection": (lambda m, x: pooled(m, m.reflect(m.conv(x))), "reflect: padding (1, 1) (reflect) has no"),
    "add of a number": (
        lambda m, x: pooled(m, m.conv(x) + 1),
        "add reads 1, which is no activation; pass tensors only.",
    ),
    "add with alpha": (
        lambda m, x: pooled(m, torch.add(m.conv(x), x, alpha=2)),
        "add: add with ['alpha'] has no integer kernel; use a + b.",
    ),
    "an addition in place to what is read later": (
        add_in_place_then_read,
        "add_: adds in place to a value that is read again later; use a + b.",
    ),
    "input by keyword": (
        lambda m, x: pooled(m, m.conv(input=x)),
        "conv: its input is a keyword argument; pass it by position.",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    forward, message = REFUSED[kind]
    with pytest.raises(TrainingError, match=re.escape(message)):
        plans_of(
            forward,
            second=conv(),
            bn=nn.BatchNorm2d(4),
            bn3=nn.BatchNorm2d(3),
            other=nn.BatchNorm2d(4),
            plain=nn.BatchNorm2d(4, affine=False),
            same=nn.Conv2d(4, 4, 3, padding="same"),
            reflect=nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            identity=nn.Identity(),
            fc2=nn.Linear(5, 5),
            deep=Classifier(lambda m, x: m.act(x), act=nn.Sigmoid()),
            block=Classifier(lambda m, x: torch.sigmoid(x)),
        )


def test_a_second_input_is_refused_by_name() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x

    with pytest.raises(TrainingError, match="the model has a second input, 'mask'; a classifier takes one image"):
        plan_units(fx.symbolic_trace(Two()))
