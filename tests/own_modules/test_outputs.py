"""What a forward may return, and how a network may end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from journey import CLASSES, operators_in_float, travel
from networks import Framed, conv_bn_relu
from torch import Tensor, nn


class Returns(Framed):
    """make: (features, logits, auxiliary logits) -> what forward returns."""

    def __init__(self, make: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__(lambda m, x: x, auxiliary=nn.Linear(8, CLASSES))
        self.make = make

    def forward(self, x: Tensor) -> Any:
        features = self.stem(x)
        return self.make(features, self.head(features.mean((2, 3))), self.auxiliary(features.amax((2, 3))))


RETURNS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], str | int]] = {
    "a dict with logits": (lambda f, y, aux: {"features": f, "logits": y}, "logits"),
    "a dict with out": (lambda f, y, aux: {"aux": aux, "out": y}, "out"),
    "a tuple": (lambda f, y, aux: (y, aux), 0),
    "a list": (lambda f, y, aux: [y, f], 0),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_logits_among_other_results(kind: str, tmp_path: Path) -> None:
    make, take = RETURNS[kind]
    model = travel(Returns(make), tmp_path, take=take)
    assert list(model.units()) == ["stem.0", "mean", "mean_flat", "head"]  # the auxiliary head is gone


ENDS: dict[str, tuple[list[nn.Module], set[str]]] = {
    "pooled convolution": ([nn.Conv2d(8, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()], set()),
    "softmax": ([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES), nn.Softmax(1)], {"softmax"}),
    "batch norm": ([nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES), nn.BatchNorm1d(CLASSES)], set()),
    "one linear layer": ([nn.Flatten(), nn.Linear(8 * 64, CLASSES)], set()),
}


@pytest.mark.parametrize("kind", ENDS)
def test_ends(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers, in_float = ENDS[kind]
    model = travel(nn.Sequential(conv_bn_relu(3, 8), *layers), tmp_path)
    assert operators_in_float(model) == in_float
