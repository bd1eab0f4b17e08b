"""Which units gates, pools, movements and concatenations become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from traced_networks import CONV, conv, plans_of, pooled, table, with_tail

from mecdeploy.training.geometry import Geometry

GATES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str, str]] = {
    # forward, name of the gate, its function
    "SiLU": (lambda m, x: m.silu(x), "silu", "sigmoid"),
    "F.silu in place": (lambda m, x: F.silu(x, inplace=True), "silu", "sigmoid"),
    "Hardswish": (lambda m, x: m.hardswish(x), "hardswish", "hard_sigmoid"),
}


@pytest.mark.parametrize("kind", GATES)
def test_a_swish_is_a_gate_and_a_product(kind: str) -> None:
    forward, name, function = GATES[kind]
    plans = plans_of(lambda m, x: pooled(m, forward(m, m.conv(x))), silu=nn.SiLU(), hardswish=nn.Hardswish(True))
    gate = f"{name}_gate"
    assert table(plans) == with_tail(CONV, (gate, "elementwise", ("conv",)), (name, "elementwise", ("conv", gate)))
    assert plans.by_name[gate].options["function"] == function and plans.by_name[gate].maximum == 1.0
    assert plans.by_name[name].options["function"] == "mul"
    assert plans.signed("conv") and plans.signed(name) and not plans.signed(gate)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], str, float, bool]] = {
    # forward, function, alpha, signed
    "sigmoid": (torch.sigmoid, "sigmoid", 0.0, False),
    "hardsigmoid": (F.hardsigmoid, "hard_sigmoid", 0.0, False),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), "leaky_relu", 0.2, True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_single_positions(name: str) -> None:
    forward, function, alpha, signed = FUNCTIONS[name]
    plans = plans_of(lambda m, x: pooled(m, forward(m.conv(x))))
    assert table(plans)[1] == (name, "elementwise", ("conv",))
    assert plans.by_name[name].options == {"function": function, "alpha": alpha}
    assert plans.signed(name) == signed


def test_squeeze_and_excitation() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x)
        return pooled(m, x * torch.sigmoid(m.expand(F.relu(m.squeeze(F.adaptive_avg_pool2d(x, 1))))))

    plans = plans_of(forward, squeeze=nn.Conv2d(4, 2, 1), expand=nn.Conv2d(2, 4, 1))
    assert table(plans)[1:6] == [
        ("adaptive_avg_pool2d", "global_average", ("conv",)),
        ("squeeze", "weighted", ("adaptive_avg_pool2d",)),
        ("expand", "weighted", ("squeeze",)),
        ("sigmoid", "elementwise", ("expand",)),
        ("mul", "elementwise", ("conv", "sigmoid")),
    ]


SHAPES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str, tuple[int, ...]]] = {
    # forward, name, shape behind the batch
    "module": (lambda m, x: m.flatten(x), "flatten", (64,)),
    "torch.flatten": (lambda m, x: torch.flatten(x, 1), "flatten", (64,)),
    "both dimensions": (lambda m, x: torch.flatten(x, 1, -1), "flatten", (64,)),
    "height and width": (lambda m, x: torch.flatten(x.flatten(2), 1), "flatten", (4, 16)),
    "view of size": (lambda m, x: x.view(x.size(0), -1), "view", (64,)),
    "view of shape": (lambda m, x: x.view(x.shape[0], 64), "view", (64,)),
    "view by features": (lambda m, x: x.view(-1, 64), "view", (64,)),
    "reshape": (lambda m, x: x.reshape(x.size()[0], -1), "reshape", (64,)),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_reshapes(kind: str) -> None:
    forward, name, shape = SHAPES[kind]
    plans = plans_of(
        lambda m, x: m.fc(forward(m, m.pool(m.conv(x)))),
        flatten=nn.Flatten(), pool=nn.MaxPool2d(2), fc=nn.Linear(64, 5),
    )  # fmt: skip
    assert [row[:2] for row in table(plans)][:3] == [("conv", "weighted"), ("pool", "max_pool"), (name, "reshape")]
    assert plans.by_name[name].options == {"shape": shape}


MOVES: dict[str, tuple[Callable[[Tensor], Tensor], str, dict[str, Any]]] = {
    "permute": (lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), "transpose", {"permutation": (0, 2, 3, 1)}),
    "transpose": (lambda x: x.transpose(-1, 2), "transpose", {"permutation": (0, 1, 3, 2)}),
    "slice": (lambda x: x[:, :, 1:-1:2], "slice", {"axis": 2, "start": 1, "stop": 7, "step": 2}),
    "select": (lambda x: x[:, :, -1].unsqueeze(2), "slice", {"axis": 2, "start": 7, "stop": 8, "step": 1}),
    "narrow": (lambda x: x.narrow(3, 2, 5), "slice", {"axis": 3, "start": 2, "stop": 7, "step": 1}),
    "max_pool2d": (
        lambda x: F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True),
        "max_pool",
        {"kernel": (3, 3), "geometry": Geometry(stride=(2, 2), padding=(1, 1, 1, 1)), "ceil_mode": True},
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_only_moves_codes(name: str) -> None:
    forward, kind, options = MOVES[name]
    plans = plans_of(lambda m, x: pooled(m, forward(m.conv(x))))
    (plan,) = [plan for plan in plans.by_name.values() if plan.name == name]
    assert (plan.kind, plan.reads, plan.options) == (kind, ("conv",), options)
    assert not plan.quantized and plans.sources(name) == ["conv"]
    assert not any(plan.kind == "island" for plan in plans.by_name.values())


def test_a_channel_shuffle_by_hand() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = m.conv(x).chunk(2, dim=1)
        joined = torch.cat([first, m.branch(second)], 1)
        turned = joined.view(joined.size(0), 2, 2, 8, 8).transpose(1, 2).contiguous()
        return pooled(m, turned.view(turned.size(0), -1, 8, 8))

    plans = plans_of(forward, branch=nn.Conv2d(2, 2, 1))
    assert table(plans)[1:7] == [
        ("getitem", "slice", ("conv",)),
        ("getitem_2", "slice", ("conv",)),
        ("branch", "weighted", ("getitem_2",)),
        ("cat", "concat", ("getitem", "branch")),
        ("view", "reshape", ("cat",)),
        ("transpose", "transpose", ("view",)),
    ]
    assert plans.by_name["getitem_2"].options == {"axis": 1, "start": 2, "stop": 4, "step": 1}
    # one scale for both sides, and so for the convolution whose half is kept
    assert plans.shared()["branch"] == plans.shared()["conv"]


@pytest.mark.parametrize("groups", [2, 4])
def test_the_operator_of_a_channel_shuffle(groups: int) -> None:
    plans = plans_of(lambda m, x: pooled(m, m.shuffle(m.conv(x))), shuffle=nn.ChannelShuffle(groups))
    assert [plan.options for plan in list(plans.by_name.values())[1:4]] == [
        {"shape": (groups, 4 // groups, 8, 8)},
        {"permutation": (0, 2, 1, 3, 4)},
        {"shape": (4, 8, 8)},
    ]


def test_a_concat_of_concats_shares_one_quantisation() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a = m.conv(x)
        b = F.relu(m.b(torch.cat([a, a], 1)))
        c = F.relu(m.c(torch.cat([a, b], 1)))
        return m.fc(torch.cat([F.max_pool2d(torch.cat([a, b], 1), 8), F.max_pool2d(c, 8)], 1).flatten(1))

    plans = plans_of(forward, b=conv(inputs=8), c=conv(inputs=8), fc=nn.Linear(12, 5))
    assert len({plans.shared()[name] for name in ("conv", "b", "c")}) == 1


AVERAGES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str, dict[str, Any]]] = {
    "adaptive to 1": (lambda m, x: F.adaptive_avg_pool2d(x, (1, 1)), "global_average", {}),
    "module": (lambda m, x: m.pool(x), "global_average", {}),
    "mean with keepdim": (lambda m, x: x.mean((2, 3), keepdim=True), "global_average", {}),
    "mean from behind": (lambda m, x: x.mean([-1, -2], keepdim=True), "global_average", {}),
    "window of the whole image": (lambda m, x: F.avg_pool2d(x, 8), "global_average", {}),
    "adaptive to 4 x 2": (
        lambda m, x: F.adaptive_avg_pool2d(x, (4, 2)),
        "average_pool",
        {"kernel": (2, 4), "stride": (2, 4), "padding": (0, 0), "count_include_pad": True},
    ),
    "windows": (
        lambda m, x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        "average_pool",
        {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "count_include_pad": False},
    ),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averages(kind: str) -> None:
    forward, made, options = AVERAGES[kind]
    plans = plans_of(lambda m, x: pooled(m, forward(m, m.conv(x))), pool=nn.AdaptiveAvgPool2d(1))
    plan = list(plans.by_name.values())[1]
    assert (plan.kind, plan.reads, plan.options) == (made, ("conv",), options)
    assert plans.signed(plan.name)


def test_a_mean_over_height_and_width_drops_the_axes_by_a_reshape() -> None:
    plans = plans_of(lambda m, x: m.fc(m.conv(x).mean((2, 3))))
    assert table(plans)[1:3] == [("mean", "global_average", ("conv",)), ("mean_flat", "reshape", ("mean",))]


@pytest.mark.parametrize(
    ("kernel", "padding"), [(3, (1, 1, 1, 1)), (2, (0, 0, 1, 1)), ((4, 1), (1, 0, 2, 0)), (1, (0, 0, 0, 0))]
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_padding_by_name(kernel: Any, padding: tuple[int, ...]) -> None:
    """The surplus of an even kernel goes to the bottom and the right, as torch puts it."""
    same = nn.Conv2d(4, 4, kernel, padding="same")
    layer = plans_of(lambda m, x: pooled(m, m.same(m.conv(x))), same=same).by_name["same"].layer
    assert layer is not None and layer.geometry is not None and layer.geometry.padding == padding


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout(p: float) -> None:
    plans = plans_of(lambda m, x: pooled(m, m.drop(m.conv(x))), drop=nn.Dropout(p))
    assert plans.by_name["drop"].options == {"probability": p}
    plans = plans_of(lambda m, x: pooled(m, F.dropout(m.conv(x), p, training=m.training)))
    assert plans.by_name["dropout"].options == {"probability": p}, "off in evaluation, and so while tracing"


def test_identities_vanish() -> None:
    plans = plans_of(lambda m, x: m.i(pooled(m, m.i(m.conv(m.i(x))))), i=nn.Identity())
    assert table(plans) == with_tail(CONV)


OUTPUTS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a tuple": lambda m, x: (pooled(m, m.conv(x)), x),
    "a dict": lambda m, x: {"auxiliary": m.conv(x), "logits": pooled(m, m.conv(x))},
    "torchvision's dict": lambda m, x: {"out": pooled(m, m.conv(x)), "aux": m.conv(x)},
    "nested": lambda m, x: [(pooled(m, m.conv(x)), x)],
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_logits_are_found_among_several_outputs(kind: str) -> None:
    assert table(plans_of(OUTPUTS[kind]))[-3:] == with_tail(CONV)[1:]


def test_a_network_may_end_in_a_pool() -> None:
    plans = plans_of(
        lambda m, x: torch.flatten(F.adaptive_avg_pool2d(m.last(m.conv(x)), 1), 1), last=nn.Conv2d(4, 5, 1)
    )
    assert table(plans)[-1] == ("dequantize", "dequantize", ("flatten",))
    assert plans.output == "dequantize" and plans.last_layers() == {"last"}


def test_a_relu_of_the_logits_is_rounded() -> None:
    plans = plans_of(lambda m, x: F.relu(pooled(m, m.conv(x))))
    assert plans.by_name["fc"].relu and not plans.by_name["fc"].float_output
    assert plans.output == "dequantize"


def test_constants_go_into_the_layer_before_them() -> None:
    torch.manual_seed(0)
    plans = plans_of(lambda m, x: pooled(m, m.conv(x) * 2 + 1))
    assert table(plans) == with_tail(CONV)
    layer = plans.by_name["conv"].layer
    torch.manual_seed(0)
    assert layer is not None and torch.equal(layer.weight, 2 * conv(inputs=3).weight)
    assert layer.bias is not None and torch.equal(layer.bias, torch.ones(4))


def test_constants_with_no_layer_before_them_are_a_depthwise_convolution() -> None:
    plans = plans_of(lambda m, x: pooled(m, F.max_pool2d(m.conv(x), 2) * 0.5))
    plan = plans.by_name["mul"]
    assert (plan.kind, plan.reads, plan.options) == ("weighted", ("max_pool2d",), {"affine": True})
    assert plan.layer is not None and torch.equal(plan.layer.weight, torch.full((4, 1, 1, 1), 0.5))
