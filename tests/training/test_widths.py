"""At which widths networks are stored and read, against tables written from the policy."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training.config import QuantConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.planning import plan_units
from mecdeploy.training.plans import Plans
from mecdeploy.training.tracing import trace
from mecdeploy.training.widths import Widths, assign_widths


class Residual(nn.Module):
    """conv1 -> ReLU -> [conv2 -> ReLU -> conv3] + shortcut -> ReLU -> conv4 -> ReLU -> + shortcut -> average -> fc."""

    def __init__(self, *, pooled_sum: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        for name in ("conv2", "conv3", "conv4"):
            self.add_module(name, nn.Conv2d(4, 4, 3, padding=1))
        self.maxpool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(4, 5)
        self.pooled_sum = pooled_sum

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv3(F.relu(self.conv2(x))) + x)
        x = self.dropout(self.maxpool(x)) if self.pooled_sum else x
        x = F.relu(self.conv4(x)) + x
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


@functools.cache
def residual_plans(pooled_sum: bool = False) -> Plans:
    return plans(Residual(pooled_sum=pooled_sum))


def widths(config: QuantConfig, model: nn.Module | None = None) -> Widths:
    return assign_widths(residual_plans() if model is None else plans(model), config)


SPEC = InputSpec.from_statistics(channels=3, height=8, width=8, mean=120.7, std=64.1)


def plans(model: nn.Module, spec: InputSpec = SPEC) -> Plans:
    return plan_units(trace(model, spec))


def test_the_policy() -> None:
    """Widths that all differ show which rule set which."""
    found = widths(QuantConfig(weight_bits=2, act_bits=3, skip_bits=4, first_last_bits=8))
    assert found.weights == {"conv1": 8, "conv2": 2, "conv3": 2, "conv4": 2, "fc": 8}
    assert found.outputs == {
        "conv1": {"act": 4, "skip": 4},  # read by conv2 (3) and the sum (4), quantised once: the wider
        "conv2": {"act": 3},
        "conv3": {"skip": 4},
        "add": {"act": 3, "skip": 4},  # the only kind that is quantised twice
        "conv4": {"skip": 4},
        "add_2": {"skip": 4},  # read by the global average
        "adaptive_avg_pool2d": {"act": 8},  # read by the last layer, through the flatten
    }


def test_equal_widths_are_one_reading() -> None:
    found = widths(QuantConfig(weight_bits=4, act_bits=8, skip_bits=8))
    assert found.outputs["add"] == {"act": 8, "skip": 8}


def test_a_skip_narrower_than_the_activations() -> None:
    found = widths(QuantConfig(act_bits=8, skip_bits=4))
    assert found.outputs["conv1"] == {"act": 8, "skip": 8}
    assert found.outputs["add"] == {"act": 8, "skip": 4}


def test_a_sum_read_only_through_a_pooling_is_quantised_once() -> None:
    """The pooling hands both its readers the same codes; a second quantisation would have no reader."""
    found = assign_widths(residual_plans(pooled_sum=True), QuantConfig(act_bits=2, skip_bits=4))
    assert found.outputs["add"] == {"skip": 4}


OVERRIDES: list[tuple[Mapping[str, Mapping[str, int]], str, int, int | None]] = [
    # overrides, unit, its weight bits, bits at which layers read it
    ({"conv2": {"weight_bits": 8}}, "conv2", 8, 4),
    ({"conv2": {"act_bits": 2}}, "conv2", 4, 2),
    ({"conv?": {"weight_bits": 3, "act_bits": 3}}, "conv2", 3, 3),
    ({"conv*": {"weight_bits": 3}, "conv2": {"weight_bits": 2}}, "conv2", 2, 4),
    ({"conv2": {"weight_bits": 2}, "*": {"weight_bits": 3}}, "conv2", 3, 4),  # the last match wins
    ({"conv1": {"weight_bits": 4}}, "conv1", 4, 8),  # the first layer too
    ({"fc": {"weight_bits": 4}}, "fc", 4, None),
]


@pytest.mark.parametrize(("overrides", "unit", "weight_bits", "act_bits"), OVERRIDES)
def test_overrides(
    overrides: Mapping[str, Mapping[str, int]], unit: str, weight_bits: int, act_bits: int | None
) -> None:
    found = widths(QuantConfig(overrides=overrides))
    assert found.weights[unit] == weight_bits
    assert found.outputs.get(unit, {}).get("act") == act_bits


def test_an_override_of_activations_leaves_the_skip_stream() -> None:
    found = widths(QuantConfig(overrides={"add": {"act_bits": 2}, "conv3": {"act_bits": 2}}))
    assert found.outputs["add"] == {"act": 2, "skip": 8}
    assert found.outputs["conv3"] == {"skip": 8}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("conv22", "quant.overrides: 'conv22' matches no unit. Did you mean 'conv2'?"),
        ("layer*.zzz", "quant.overrides: 'layer*.zzz' matches no unit. Units are: conv1, conv2, conv3, add, conv4, "),
    ],
)
def test_an_override_that_matches_nothing(pattern: str, message: str) -> None:
    with pytest.raises(TrainingError, match=re.escape(message)):
        widths(QuantConfig(overrides={pattern: {"weight_bits": 4}}))


def test_a_layer_nobody_reads_is_dropped() -> None:
    class Unread(Residual):
        def forward(self, x: Tensor) -> Tensor:
            self.conv1(x)
            logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(self.conv2(self.first(x)), 1), 1))
            return logits

    model = Unread()
    model.first = nn.Conv2d(3, 4, 1)
    assert list(widths(QuantConfig(), model).weights) == ["first", "conv2", "fc"]


def test_a_single_layer_is_first_and_last() -> None:
    single = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    assert widths(QuantConfig(first_last_bits=8, weight_bits=2), single) == Widths(weights={"1": 8}, outputs={})


class General(nn.Module):
    """Every kernel that is no layer: a concat, its BatchNorm, a gate, a product, a windowed mean, a pool at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 5, 1)
        self.norm = nn.BatchNorm2d(8)
        self.gate = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 8, 8] to [N, 5]."""
        x = self.a(x)
        x = torch.cat([x, F.relu(self.b(F.relu(x)))], 1)
        x = F.relu(self.norm(x))
        x = F.avg_pool2d(x * torch.sigmoid(self.gate(x)), 2)
        return torch.flatten(F.adaptive_avg_pool2d(self.c(x), 1), 1)


def test_the_policy_of_general_networks() -> None:
    """What layers read has act_bits, what other kernels read skip_bits; a concat's sources have one width together."""
    found = widths(QuantConfig(weight_bits=2, act_bits=3, skip_bits=4, first_last_bits=8), General())
    assert found.weights == {"a": 8, "b": 2, "norm": 8, "gate": 2, "c": 8}
    assert found.outputs == {
        "a": {"skip": 4},  # read by a ReLU that cannot join it, and by the concat
        "relu": {"act": 3},
        "b": {"skip": 4},  # with a's, read by a BatchNorm
        "norm": {"act": 4, "skip": 4},  # quantised once: the gate's convolution reads 3, the product 4
        "gate": {"skip": 4},
        "sigmoid": {"skip": 4},
        "mul": {"skip": 4},
        "avg_pool2d": {"act": 8},  # read by the last layer
        "c": {"skip": 4},
        "adaptive_avg_pool2d": {"skip": 8},  # the logits
    }


def test_values_that_a_concat_joins_have_the_widest_width_of_all() -> None:
    found = widths(QuantConfig(overrides={"b": {"act_bits": 8}}), Joined())
    assert found.outputs["a"] == found.outputs["b"] == {"act": 8}
    assert widths(QuantConfig(), Joined()).outputs["a"] == {"act": 4}


class Joined(nn.Module):
    """Two convolutions, read side by side by a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 8, 8] to [N, 5]."""
        joined = torch.cat([F.relu(self.a(x)), self.b(x)], 1)
        logits: Tensor = self.fc(F.relu(self.c(joined)).mean((2, 3)))
        return logits


def test_one_bit_holds_one_sign() -> None:
    """conv3 and the sum behind conv4 have both signs; what a ReLU gives a layer has one."""
    found = assign_widths(residual_plans(), QuantConfig(weight_bits=1, act_bits=1))
    assert found.weights["conv2"] == 1 and found.weights["conv1"] == 8
    assert found.outputs["conv2"] == {"act": 1}
    linear = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(4)), nn.Flatten(), nn.Linear(3 * 64, 4))
    signed = widths(QuantConfig(act_bits=1, overrides={"1": {"act_bits": 1}}), linear)
    assert {signed.outputs[name]["act"] for name in ("0", "1", "2")} == {2}
