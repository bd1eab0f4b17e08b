"""General networks: with every quantiser passing reals on, the units compute the float network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from traced_networks import SPEC, classifier, conv, pooled

from mecdeploy.training.config import QuantConfig
from mecdeploy.training.preparation import prepare
from mecdeploy.training.quantizers import ActivationQuantizer, QTensor
from mecdeploy.training.weight_quantizers import WeightQuantizer


def gates(m: Any, x: Tensor) -> Tensor:
    y = F.hardswish(m.bn(m.conv(x)))
    y = y * F.hardsigmoid(m.second(F.adaptive_avg_pool2d(y, 1)))
    return pooled(m, F.leaky_relu(F.silu(y) * torch.sigmoid(y), 0.1) + y)


def joined(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y = torch.cat([y, F.relu(m.second(F.relu(m.bn(y))))], 1)
    y = y.view(y.shape[0], 2, 4, 8, 8).transpose(1, 2).reshape(y.shape[0], 8, 8, 8)
    first, second = y.chunk(2, 1)
    return pooled(m, F.avg_pool2d(first, 3, 2, 1, count_include_pad=False) + F.avg_pool2d(second, 3, 2, 1))


def reused(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = m.second(F.relu(m.second(y)))
    z += F.relu(y) + 0.5 * y
    return pooled(m, F.relu6(m.bn(z), inplace=True) * 2 - 1)


def tokens(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x).flatten(2).transpose(1, 2)
    z = m.norm(y)
    y = y + m.attention(z, z, z, need_weights=False)[0]
    return m.fc(F.gelu(m.linear(y))[:, 0] + y.mean(1))


NETWORKS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gates": gates, "joined": joined, "reused": reused, "tokens": tokens,
}  # fmt: skip


@pytest.mark.parametrize("zero_point", ["fixed", "learned"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_without_rounding_the_units_compute_the_float_network(
    name: str, zero_point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = classifier(
        NETWORKS[name],
        second=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4), norm=nn.LayerNorm(4), linear=nn.Linear(4, 4),
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
    )  # fmt: skip
    norm = model.get_submodule("bn")
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    for buffer in ("running_mean", "running_var"):
        nn.init.uniform_(norm.get_buffer(buffer), 0.3, 1.0)
    quantized = prepare(model, QuantConfig(zero_point=zero_point), SPEC).double().train()
    monkeypatch.setattr(WeightQuantizer, "forward", lambda _, weight: (weight, torch.ones(len(weight))))
    for quantizer in (module for module in quantized.modules() if isinstance(module, ActivationQuantizer)):
        quantizer.samples = []  # calibration's way to pass reals on
    pixels = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x = SPEC.quantized(pixels)

    logits = quantized.run(QTensor(x.codes.double(), x.scale.double(), x.zero_point, x.qmax))

    expected = model.double().train()(x.codes.double() * x.scale.double())
    assert expected.std(0).min().item() > 1e-4, "the logits must tell images apart"
    # float64, whose 1e-16 grows through the layers; a wrong wire is an error of 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-8 * expected.abs().max().item())


def test_unused_layers_are_not_needed() -> None:
    model = classifier(lambda m, x: pooled(m, m.conv(x)), second=conv())
    assert list(prepare(model, QuantConfig(), SPEC).units()) == ["conv", "adaptive_avg_pool2d", "flatten", "fc"]
