"""Networks of timm, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from journey import (
    CLASSES,
    EIGHT_BITS,
    export_and_check,
    make_one,
    operators_in_float,
    settle,
    spec_for,
    train_a_little,
)

timm = pytest.importorskip("timm")

MODELS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "test_efficientnet": ({}, set()),
    "mobilenetv3_small_050": ({}, set()),
    "resnet10t": ({}, set()),
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 2}, {"layer_norm", "gelu", "scaled_dot_product_attention"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_timm(name: str, tmp_path: Path) -> None:
    """Exactness alone: random weights of some depth amplify 8-bit rounding until nothing of the logits is left."""
    options, in_float = MODELS[name]
    network = settle(timm.create_model(name, pretrained=False, num_classes=CLASSES, **options), spec_for(32))
    model, images = make_one(network, size=32, config=EIGHT_BITS)
    found = operators_in_float(model)
    assert in_float <= found and bool(in_float) == bool(found)
    train_a_little(model, images)
    export_and_check(model, images, tmp_path)
