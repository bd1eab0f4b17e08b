"""What is left in float: islands, their readers, and what is refused instead of left there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from traced_networks import SPEC, Classifier, classifier, conv, plans_of, pooled, table

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.planning import plan_units
from mecdeploy.training.tracing import trace

ISLANDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[str, ...], str]] = {
    # forward, operators, reason
    "gelu": (lambda m, x: F.gelu(x), ("gelu",), "gelu has no integer kernel"),
    "softmax": (lambda m, x: x.softmax(1), ("softmax",), "softmax has no integer kernel"),
    "hardtanh": (
        lambda m, x: F.hardtanh(x),
        ("hardtanh",),
        "hardtanh to -1.0..1.0 has no integer kernel; from 0 up it is a ReLU",
    ),
    "ceil_mode": (
        lambda m, x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
        ("avg_pool2d",),
        "average pooling over windows that overhang (ceil_mode), or with divisor_override, has no integer kernel",
    ),
    "uneven windows": (
        lambda m, x: F.adaptive_avg_pool2d(x, 3),
        ("adaptive_avg_pool2d",),
        "average pooling of (8, 8) positions to (3, 3) has windows of several sizes",
    ),
}


@pytest.mark.parametrize("kind", ISLANDS)
def test_what_has_no_kernel_is_an_island_between_units(kind: str) -> None:
    forward, operators, reason = ISLANDS[kind]
    plans = plans_of(lambda m, x: pooled(m, m.last(forward(m, m.conv(x)))), last=conv())
    (island,) = [plan for plan in plans.by_name.values() if plan.kind == "island"]
    assert island.reads == ("conv",)
    assert (island.options["operators"], island.options["reason"]) == (operators, reason)
    (codes,) = [plan for plan in plans.by_name.values() if plan.kind == "quantize"]
    assert codes.reads == (island.name,) and plans.by_name["last"].reads == (codes.name,)
    assert codes.options["signed"] == (kind != "softmax")


def test_a_layer_listed_under_float_layers_is_an_island() -> None:
    forward = lambda m, x: pooled(m, m.second(F.relu(m.conv(x))))  # noqa: E731
    plans = plans_of(forward, float_layers=["sec*"], second=conv(bias=True))
    island = plans.by_name["second"]
    assert (island.kind, island.reads) == ("island", ("conv",))
    assert island.options["reason"] == "listed under quant.float_layers"
    assert island.options["operators"] == ("conv2d", "adaptive_avg_pool2d", "flatten")
    parameters = dict(island.options["module"].named_parameters())
    assert sorted(parameters) == ["second_bias", "second_weight"], "its weights go on learning"


@pytest.mark.parametrize("bounded", [F.relu6, F.hardsigmoid])
def test_values_of_different_bounds_cannot_share_a_scale(bounded: Callable[[Tensor], Tensor]) -> None:
    """The bound of either lies in its scale; side by side with values of another it would be lost."""
    forward = lambda m, x: pooled(m, m.last(torch.cat([bounded(m.conv(x)), m.second(x)], 1)))  # noqa: E731
    layers = {"second": conv(inputs=3), "last": conv(inputs=8)}
    island = next(plan for plan in plans_of(forward, **layers).by_name.values() if plan.kind == "island")
    assert island.options["operators"] == ("cat",) and "different upper bounds" in island.options["reason"]


@pytest.mark.parametrize("function", [F.relu6, F.hardsigmoid])
def test_values_of_one_bound_share_a_scale(function: Callable[[Tensor], Tensor]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return pooled(m, m.last(torch.cat([function(m.conv(x)), function(m.second(x))], 1)))

    plans = plans_of(forward, second=conv(inputs=3), last=conv(inputs=8))
    assert "cat" in plans.by_name and plans.by_name["cat"].kind == "concat"


def test_reflect_padding_is_an_island_before_an_integer_convolution() -> None:
    reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    plans = plans_of(lambda m, x: pooled(m, m.reflect(m.conv(x))), reflect=reflect)
    kinds = [plan.kind for plan in plans.by_name.values()]
    assert kinds == ["weighted", "island", "quantize", "weighted", "global_average", "reshape", "weighted"]
    (island,) = [plan for plan in plans.by_name.values() if plan.kind == "island"]
    assert island.options["operators"] == ("pad",)
    layer = [plan for plan in plans.by_name.values() if plan.kind == "weighted"][1].layer
    assert layer is not None and layer.geometry is not None and layer.geometry.padding == (0, 0, 0, 0)


def test_operators_that_feed_each_other_are_one_island_unless_a_unit_lies_between() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.gelu(m.conv(x))
        return pooled(m, F.elu(F.gelu(m.second(y)) + y))

    plans = plans_of(forward, second=conv())
    islands = [plan for plan in plans.by_name.values() if plan.kind == "island"]
    assert [plan.options["operators"] for plan in islands] == [
        ("gelu",),
        ("gelu", "add", "elu", "adaptive_avg_pool2d", "flatten"),
    ]
    assert islands[1].reads == ("second", islands[0].name)


def test_linear_layers_of_tokens_hand_their_products_to_the_islands_unrounded() -> None:
    """A block of a transformer: LayerNorm, three projections, attention, an output projection."""
    block = Classifier(
        attend,
        norm=nn.LayerNorm(4), query=nn.Linear(4, 4), key=nn.Linear(4, 4), value=nn.Linear(4, 4), out=nn.Linear(4, 4),
    )  # fmt: skip
    plans = plans_of(lambda m, x: m.fc(m.block(m.conv(x).flatten(2).transpose(1, 2))[:, 0]), block=block)
    weighted = {plan.name: plan for plan in plans.by_name.values() if plan.kind == "weighted"}
    assert list(weighted) == ["conv", "block.query", "block.key", "block.value", "block.out", "fc"]
    assert {name for name, plan in weighted.items() if plan.float_output} == set(list(weighted)[1:])
    islands = [plan for plan in plans.by_name.values() if plan.kind == "island"]
    assert [plan.options["operators"][0] for plan in islands] == ["layer_norm", "scaled_dot_product_attention", "add"]
    # one quantisation of the normalised tokens for all three projections
    assert weighted["block.query"].reads == weighted["block.key"].reads == weighted["block.value"].reads


def attend(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return x + m.out(F.scaled_dot_product_attention(m.query(y), m.key(y), m.value(y)))


def test_a_class_token_reads_the_batch_size_alone() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        tokens = m.conv(x).flatten(2).transpose(1, 2)
        return m.fc(m.norm(torch.cat([m.token.expand(x.shape[0], -1, -1), tokens], 1))[:, 0])

    model = classifier(forward, norm=nn.LayerNorm(4))
    model.register_parameter("token", nn.Parameter(torch.ones(1, 1, 4)))
    plans = plan_units(trace(model, SPEC))
    (island,) = [plan for plan in plans.by_name.values() if plan.kind == "island"]
    assert island.reads == ("pixels", "transpose") and island.options["asks_for_batch_size"]


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "a layer with weights and no kernel": (
        lambda m, x: pooled(m, m.block(m.conv(x))),
        r"block\.up \(traced_networks\.py:\d+\): conv_transpose2d has no integer kernel \(transposed "
        r"convolutions have none\)\. To keep it in float, list it: quant\.float_layers = \[\"block\.up\"\]\.",
    ),
    "a functional one": (
        lambda m, x: pooled(m, F.conv_transpose2d(m.conv(x), torch.ones(4, 4, 1, 1))),
        r"conv_transpose2d \(traced_networks\.py:\d+\): conv_transpose2d has no integer kernel",
    ),
    "a recurrent one": (lambda m, x: m.fc(m.lstm(m.conv(x).flatten(2))[0][:, -1, :4]), r"lstm.*: lstm has no integer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name_and_place(kind: str) -> None:
    forward, message = REFUSED[kind]
    block = Classifier(lambda m, x: m.up(x), up=nn.ConvTranspose2d(4, 4, 1))
    with pytest.raises(TrainingError, match=f"^{message}"):
        plans_of(forward, block=block, lstm=nn.LSTM(64, 4, batch_first=True))


def test_what_was_refused_is_an_island_once_listed() -> None:
    block = Classifier(lambda m, x: m.up(x), up=nn.ConvTranspose2d(4, 4, 1))
    plans = plans_of(lambda m, x: pooled(m, m.block(m.conv(x))), float_layers=["block.up"], block=block)
    assert plans.by_name["block.up"].options["operators"][0] == "conv_transpose2d"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("convv", r"quant\.float_layers: 'convv' matches no operator\. Did you mean 'conv'\?"),
        ("blocks.7.*", r"quant\.float_layers: 'blocks\.7\.\*' matches no operator\. There are: conv, adaptive_avg_po"),
    ],
)
def test_a_pattern_that_matches_nothing(pattern: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        plans_of(lambda m, x: pooled(m, m.conv(x)), float_layers=["fc", pattern])


def test_table_of_an_island_names_its_outputs() -> None:
    """Two values that leave one island are told apart by their position."""

    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = F.gelu(m.conv(x)).chunk(2, 1)
        return pooled(m, torch.cat([F.relu(m.a(first)), F.relu(m.b(second))], 1))

    plans = plans_of(forward, a=nn.Conv2d(2, 2, 1), b=nn.Conv2d(2, 2, 1))
    island = next(plan for plan in plans.by_name.values() if plan.kind == "island")
    assert island.output_count == 2
    reads = [reads for _, kind, reads in table(plans) if kind == "quantize"]
    assert reads == [(f"{island.name}/0",), (f"{island.name}/1",)]
