"""Which units the layers, activations and sums of small hand-written modules become."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from traced_networks import CONV, Classifier, conv, plans_of, pooled, table, with_tail

from mecdeploy.training.geometry import Geometry


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
    "clamp from 0": (lambda m, x: x.clamp(min=0), None),
    "clamp to 3": (lambda m, x: x.clamp(0, 3), 3.0),
    "ReLU6": (lambda m, x: m.relu6(x), 6.0),
    "F.relu6": (lambda m, x: F.relu6(x), 6.0),
    "F.hardtanh": (lambda m, x: F.hardtanh(x, 0.0, 2.5), 2.5),
    "ReLU6 after ReLU": (lambda m, x: m.relu6(m.relu(x)), 6.0),
    "ReLU after ReLU6": (lambda m, x: m.relu(m.relu6(x)), 6.0),
    "through Identity": (lambda m, x: m.relu(m.identity(x)), None),
    "after a shape query": (relu_after_a_shape_query, None),
}


@pytest.mark.parametrize("kind", RELUS)
def test_a_relu_joins_the_unit_before_it(kind: str) -> None:
    relu, maximum = RELUS[kind]
    plans = plans_of(
        lambda m, x: pooled(m, relu(m, m.bn(m.conv(x)))),
        bn=nn.BatchNorm2d(4),
        relu=nn.ReLU(inplace=True),
        relu6=nn.ReLU6(),
        identity=nn.Identity(),
    )
    assert table(plans) == with_tail(CONV)
    plan = plans.by_name["conv"]
    assert (plan.relu, plan.maximum) == (True, maximum)
    assert plan.batch_norm is not None and plan.batch_norm.num_features == 4
    assert not plans.signed("conv") and not plans.signed("adaptive_avg_pool2d")


JOINED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "add": lambda m, x: m.second(x) + x,
    "mul": lambda m, x: m.second(x) * x,
    "avg_pool2d": lambda m, x: F.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda m, x: F.adaptive_avg_pool2d(x, 1),
    "bn": lambda m, x: m.bn(F.max_pool2d(x, 2)),
}


@pytest.mark.parametrize("name", JOINED)
def test_a_relu_joins_every_kernel_that_rounds(name: str) -> None:
    plans = plans_of(
        lambda m, x: m.fc(F.relu(JOINED[name](m, m.conv(x))).mean((2, 3))), second=conv(), bn=nn.BatchNorm2d(4)
    )
    assert plans.by_name[name].relu and not plans.signed(name)
    assert "relu" not in plans.by_name


def read_before_and_after(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return pooled(m, F.relu(y) + y)


def read_around_an_identity(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return pooled(m, F.relu(m.identity(y)) + y)


@pytest.mark.parametrize("forward", [read_before_and_after, read_around_an_identity])
def test_a_relu_that_others_read_around_is_a_kernel_of_its_own(forward: Callable[[Any, Tensor], Tensor]) -> None:
    plans = plans_of(forward, identity=nn.Identity())
    assert table(plans) == with_tail(CONV, ("relu", "elementwise", ("conv",)), ("add", "add", ("relu", "conv")))
    relu = plans.by_name["relu"]
    assert (relu.options, relu.relu) == ({"function": "leaky_relu", "alpha": 0.0}, True)
    assert plans.signed("conv") and not plans.signed("relu")


def test_a_relu6_behind_a_max_pool_keeps_its_bound() -> None:
    plans = plans_of(lambda m, x: pooled(m, F.relu6(F.max_pool2d(m.conv(x), 2))))
    assert table(plans)[2] == ("relu6", "elementwise", ("max_pool2d",))
    assert plans.by_name["relu6"].maximum == 6.0 and plans.by_name["conv"].maximum is None


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
    assert table(plans) == with_tail(CONV, ("second", "weighted", ("conv",)), ("add", "add", ("second", "conv")))
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


def test_an_addition_in_place_is_what_later_lines_read() -> None:
    """In torch the last sum reads what add_ has changed: the sum twice."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        z = m.second(y)
        return pooled(m, z.add_(y) + z)

    assert table(plans_of(forward, second=conv()))[2:4] == [
        ("add", "add", ("second", "conv")),
        ("add_2", "add", ("add", "add")),
    ]


def test_function_names_carry_the_module_that_calls_and_a_number() -> None:
    block = Classifier(lambda m, x: (lambda y: m.b(y) + y + x)(m.a(x)), a=conv(), b=conv())
    plans = plans_of(lambda m, x: pooled(m, m.block(m.conv(x))), block=block)
    assert table(plans) == with_tail(
        CONV,
        ("block.a", "weighted", ("conv",)),
        ("block.b", "weighted", ("block.a",)),
        ("block.add", "add", ("block.b", "block.a")),
        ("block.add_2", "add", ("block.add", "conv")),
    )


def test_every_call_of_a_reused_layer_gets_a_copy_of_its_own() -> None:
    plans = plans_of(
        lambda m, x: pooled(m, F.relu(m.bn(m.second(F.relu(m.bn(m.second(m.conv(x)))))))),
        second=conv(),
        bn=nn.BatchNorm2d(4),
    )
    assert table(plans) == with_tail(CONV, ("second", "weighted", ("conv",)), ("second_2", "weighted", ("second",)))
    first, second = plans.by_name["second"], plans.by_name["second_2"]
    assert first.layer is not None and second.layer is not None
    assert torch.equal(first.layer.weight, second.layer.weight)
    assert first.batch_norm is not None and second.batch_norm is not None and first.batch_norm is not second.batch_norm


BATCH_NORMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "of the image": (lambda m, x: m.conv(m.bn3(x)), "bn3"),
    "after a ReLU": (lambda m, x: m.bn(F.relu(m.conv(x))), "bn"),
    "after a BatchNorm": (lambda m, x: m.other(m.bn(m.conv(x))), "other"),
    "after an addition": (lambda m, x: m.bn((lambda y: m.second(y) + y)(m.conv(x))), "bn"),
    "read around": (lambda m, x: (lambda y: m.bn(y) + y)(m.conv(x)), "bn"),
}


@pytest.mark.parametrize("kind", BATCH_NORMS)
def test_a_batch_norm_without_a_convolution_is_a_depthwise_one(kind: str) -> None:
    forward, name = BATCH_NORMS[kind]
    plans = plans_of(
        lambda m, x: pooled(m, forward(m, x)),
        bn=nn.BatchNorm2d(4), other=nn.BatchNorm2d(4), bn3=nn.BatchNorm2d(3), second=conv(),
    )  # fmt: skip
    plan = plans.by_name[name]
    channels = 3 if name == "bn3" else 4
    assert plan.kind == "weighted" and plan.options == {"affine": True}
    assert plan.layer is not None and plan.batch_norm is not None
    assert torch.equal(plan.layer.weight, torch.ones(channels, 1, 1, 1)) and plan.layer.bias is None
    assert plan.layer.geometry == Geometry(stride=(1, 1), padding=(0, 0, 0, 0), groups=channels)


def test_a_batch_norm_without_gamma_folds_with_a_gamma_of_one() -> None:
    norm = nn.BatchNorm2d(4, affine=False)
    assert norm.running_mean is not None
    norm.running_mean.fill_(0.7)
    plans = plans_of(lambda m, x: pooled(m, m.plain(m.conv(x))), plain=norm)
    assert table(plans) == with_tail(CONV)
    folded = plans.by_name["conv"].batch_norm
    assert folded is not None and folded.running_mean is not None
    assert torch.equal(folded.weight, torch.ones(4)) and torch.equal(folded.bias, torch.zeros(4))
    assert torch.equal(folded.running_mean, torch.full((4,), 0.7))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_linear_layers_take_in_a_batch_norm_of_vectors(batch_norm: bool) -> None:
    plans = plans_of(
        lambda m, x: m.fc(F.relu(m.norm(m.hidden(torch.flatten(m.conv(x), 1))))),
        hidden=nn.Linear(256, 4),
        norm=nn.BatchNorm1d(4) if batch_norm else nn.Identity(),
    )
    assert table(plans) == [
        CONV,
        ("flatten", "reshape", ("conv",)),
        ("hidden", "weighted", ("flatten",)),
        ("fc", "weighted", ("hidden",)),
    ]
    assert (plans.by_name["hidden"].batch_norm is not None) == batch_norm
    assert plans.output == "fc" and plans.by_name["fc"].float_output
    assert plans.signed("flatten") and not plans.signed("hidden")


def test_readers_are_seen_through_what_passes_codes_on() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.drop(m.pool(m.conv(x)))
        return pooled(m, m.second(y) + y)

    plans = plans_of(forward, second=conv(), pool=nn.MaxPool2d(2), drop=nn.Dropout(0.1))
    assert {plan.name for plan in plans.readers("conv")} == {"second", "add"}
    assert [plan.name for plan in plans.readers("pixels")] == ["conv"]
    assert plans.sources("drop") == ["conv"]
    assert (plans.first_layers(), plans.last_layers()) == ({"conv"}, {"fc"})


def test_a_pool_of_pixels_has_both_signs() -> None:
    """Normalised pixels are negative below the mean; without their sign the pool would cut them off."""
    plans = plans_of(lambda m, x: pooled(m, m.conv(F.adaptive_avg_pool2d(x, 4))))
    assert plans.signed("adaptive_avg_pool2d") and plans.signed("pixels")
