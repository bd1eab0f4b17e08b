"""From a float classifier to units: whole networks against tables, and against the float network itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training.config import ModelConfig, QuantConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.models import build_model
from mecdeploy.training.movement import MaxPoolUnit
from mecdeploy.training.preparation import prepare
from mecdeploy.training.quantizers import ActivationQuantizer, QTensor
from mecdeploy.training.units import WeightedUnit
from mecdeploy.training.weight_quantizers import WeightQuantizer

Row = tuple[str, tuple[str, ...], dict[str, tuple[int, bool]], int | None]
"""Unit, what it reads, its outputs as name -> (bits, signed), bits of its weights."""


def spec(size: int) -> InputSpec:
    return InputSpec.from_statistics(channels=3, height=size, width=size, mean=120.7, std=64.1)


def build(name: str, size: int, **config: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name=name, **config), num_classes=10, channels=3, height=size, width=size)


def rows(model: QuantizedModel) -> list[Row]:
    found: list[Row] = []
    for step in model.program:
        unit = model.unit(step.unit)
        outputs = zip(unit.output_names, unit.outputs, strict=False)
        bits = {name: (output.bits, output.signed) for name, output in outputs}  # type: ignore[union-attr]
        weight_bits = unit.weight_quantizer.bits if isinstance(unit, WeightedUnit) else None
        found.append((step.unit, step.reads, bits, weight_bits))
    return found


def residual_block(name: str, x: dict[str, str], *, shortcut: bool, roles: dict[str, int]) -> tuple[list[Row], Any]:
    """Rows of one basic block at W2 A3 and 4-bit skips. x: role -> value read; roles: role -> bits of the sum."""
    block: list[Row] = []
    skip = x.get("skip", "")
    if shortcut:
        skip = f"{name}.downsample.0"
        block.append((skip, (x["act"],), {skip: (4, True)}, 2))
    block.append((f"{name}.conv1", (x["act"],), {f"{name}.conv1": (3, False)}, 2))
    block.append((f"{name}.conv2", (f"{name}.conv1",), {f"{name}.conv2": (4, True)}, 2))
    values = {role: f"{name}.add" if len(roles) == 1 else f"{name}.add/{role}" for role in roles}
    outputs = {values[role]: (bits, False) for role, bits in roles.items()}
    block.append((f"{name}.add", (f"{name}.conv2", skip), outputs, None))
    return block, values


@pytest.mark.parametrize("blocks", [1, 3])
def test_small_residual_nets(blocks: int) -> None:
    """resnet8 and resnet20, W2 A3, skips at 4: the convolution after a sum reads 3 bits, the next sum 4."""
    model = build(f"resnet{6 * blocks + 2}", 32)
    found = rows(prepare(model, QuantConfig(weight_bits=2, act_bits=3, skip_bits=4, first_last_bits=8), spec(32)))

    expected: list[Row] = [("conv1", ("pixels",), {"conv1": (4, False)}, 8)]
    values = {"act": "conv1", "skip": "conv1"}
    for stage in (1, 2, 3):
        for index in range(blocks):
            last_of_stage = index == blocks - 1
            roles = {"act": 3} if last_of_stage else {"act": 3, "skip": 4}
            if last_of_stage and stage == 3:
                roles = {"skip": 4}  # the global average reads it
            shortcut = stage > 1 and index == 0
            block, values = residual_block(f"layer{stage}.{index}", values, shortcut=shortcut, roles=roles)
            expected += block
    expected += [
        ("avgpool", (values["skip"],), {"avgpool": (8, False)}, None),
        ("flatten", ("avgpool",), {}, None),
        ("fc", ("flatten",), {}, 8),
    ]
    assert found == expected


def test_torchvision_resnet18_with_its_max_pool() -> None:
    model = prepare(build("resnet18", 224), QuantConfig(weight_bits=2, act_bits=3, skip_bits=4), spec(224))
    found = rows(model)
    assert found[:2] == [
        ("conv1", ("pixels",), {"conv1": (4, False)}, 8),  # a sum reads it through the max pool
        ("maxpool", ("conv1",), {}, None),
    ]
    pool = model.unit("maxpool")
    assert isinstance(pool, MaxPoolUnit) and pool.kernel == (3, 3)
    assert (pool.geometry.stride, pool.geometry.padding, pool.ceil_mode) == ((2, 2), (1, 1, 1, 1), False)
    values: dict[str, str] = {"act": "maxpool", "skip": "maxpool"}
    position = 2
    for stage in (1, 2, 3, 4):
        for index in (0, 1):
            roles = {"act": 3, "skip": 4} if index == 0 else {"act": 3}
            if (stage, index) == (4, 1):
                roles = {"skip": 4}
            block, values = residual_block(
                f"layer{stage}.{index}", values, shortcut=stage > 1 and index == 0, roles=roles
            )
            # torchvision computes the shortcut last
            got = found[position : position + len(block)]
            assert sorted(got) == sorted(block)
            position += len(block)
    assert [row[0] for row in found[position:]] == ["avgpool", "flatten", "fc"]


def test_mobilenet_v2() -> None:
    model = prepare(build("mobilenet_v2", 224), QuantConfig(weight_bits=2, act_bits=3, skip_bits=4), spec(224))
    found = {row[0]: row for row in rows(model)}
    assert found["features.0.0"] == ("features.0.0", ("pixels",), {"features.0.0": (3, False)}, 8)
    # expansion, depthwise, linear bottleneck: only the last has both signs
    assert found["features.2.conv.0.0"][2] == {"features.2.conv.0.0": (3, False)}
    assert found["features.2.conv.1.0"][2] == {"features.2.conv.1.0": (3, False)}
    assert found["features.2.conv.2"][2] == {"features.2.conv.2": (4, True)}  # a sum reads it
    assert found["features.1.conv.1"][2] == {"features.1.conv.1": (3, True)}  # none does
    assert found["features.3.add"] == (
        "features.3.add", ("features.2.conv.2", "features.3.conv.2"), {"features.3.add": (3, True)}, None,
    )  # fmt: skip
    assert found["features.5.add"][2] == {"features.5.add/act": (3, True), "features.5.add/skip": (4, True)}
    assert found["features.6.conv.0.0"][1] == ("features.5.add/act",)
    assert found["features.6.add"][1] == ("features.5.add/skip", "features.6.conv.2")
    assert found["features.18.0"][2] == {"features.18.0": (4, False)}
    assert found["classifier.1"] == ("classifier.1", ("classifier.0",), {}, 8)
    assert len([name for name in found if name.endswith(".add")]) == 10
    maxima = {name: model.unit(name).output.maximum for name in found if model.unit(name).output is not None}  # type: ignore[union-attr]
    clipped = {name for name in found if name.endswith((".0.0", ".1.0"))} | {"features.18.0"}
    assert {name for name, maximum in maxima.items() if maximum == 6.0} == clipped
    assert set(maxima.values()) == {6.0, None}
    depthwise = model.unit("features.2.conv.1.0")
    assert isinstance(depthwise, WeightedUnit) and depthwise.geometry is not None
    assert (depthwise.geometry.groups, depthwise.geometry.stride) == (96, (2, 2))


@pytest.mark.parametrize(("name", "size"), [("resnet8", 16), ("resnet20", 16), ("resnet18", 32), ("mobilenet_v2", 32)])
@torch.no_grad()
def test_without_rounding_the_units_compute_the_float_network(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every quantiser passes reals on: what is left is wiring, BatchNorms, ReLUs and negative gammas."""
    model = build(name, size)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    quantized = prepare(model, QuantConfig(), spec(size)).double().train()
    monkeypatch.setattr(WeightQuantizer, "forward", lambda _, weight: (weight, torch.ones(len(weight))))
    for quantizer in (module for module in quantized.modules() if isinstance(module, ActivationQuantizer)):
        quantizer.samples = []  # calibration's way to pass reals on
    pixels = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator)
    x = spec(size).quantized(pixels)

    logits = quantized.run(QTensor(x.codes.double(), x.scale.double(), x.zero_point, x.qmax))

    expected = model.double().train()(x.codes.double() * x.scale.double())
    assert expected.std(0).min().item() > 1e-3, "the logits must tell images apart"
    # float64, whose 1e-16 grows through up to 53 layers; a wrong wire is an error of 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-8 * expected.abs().max().item())


def test_the_float_model_is_left_alone() -> None:
    model = build("resnet8", 16)
    with torch.no_grad():
        model.bn1.weight.neg_()  # type: ignore[operator, union-attr]
    before = copy.deepcopy(model.state_dict())
    quantized = prepare(model, QuantConfig(), spec(16))
    for parameter in quantized.parameters():
        with torch.no_grad():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Small(nn.Module):
    """A classifier whose hidden layer has a name of choice."""

    def __init__(self, hidden: str) -> None:
        super().__init__()
        self.hidden = hidden
        self.add_module(hidden, nn.Linear(12, 4))
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(F.relu(self.get_submodule(self.hidden)(torch.flatten(x, 1))))
        return logits


@pytest.mark.parametrize("name", ["pixels", "logits"])
def test_a_layer_named_like_an_end_of_the_model(name: str) -> None:
    with pytest.raises(TrainingError, match=f"{name}: the model's own {name} have this name; rename the layer."):
        prepare(Small(name), QuantConfig(), spec(2))


def test_the_last_layer_may_be_called_logits() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.logits(torch.flatten(x, 1))
            return logits

    model = prepare(Last(), QuantConfig(), spec(2))
    assert model.unit("logits").output_names == ("logits",)
    assert model(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).shape == (1, 4)


def test_state_dict_keys_read_like_the_float_models() -> None:
    quantized = prepare(build("resnet8", 16), QuantConfig(), spec(16))
    keys = set(quantized.state_dict())
    for key in ("layer1.0.conv1.weight", "layer1.0.conv1.batch_norm.running_var", "fc.bias"):
        assert f"body.{key}" in keys
