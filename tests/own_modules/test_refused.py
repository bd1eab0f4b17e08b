"""What cannot be done is refused in one line: where in the user's code, what, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from journey import CLASSES, EIGHT_BITS, make_one, operators_in_float, settle, spec_for, travel
from networks import Framed, conv
from torch import Tensor, nn
from torch.nn import functional as F

import mecdeploy
from mecdeploy import QuantConfig

HERE = re.escape(__file__)
LINE = r"\d+"


def branches(m: Any, x: Tensor) -> Tensor:
    if x.mean() > 0:
        return x * 2
    return x


def counts(m: Any, x: Tensor) -> Tensor:
    return x[:, : int(x.max()) + 1]


def writes(m: Any, x: Tensor) -> Tensor:
    first = x[:, 0]
    x[:, 1] = 0
    return x + first.unsqueeze(1)


class TwoImages(Framed):
    def forward(self, left: Tensor, right: Tensor) -> Any:
        return super().forward(left - right)


class ReturnsNothing(Framed):
    def forward(self, x: Tensor) -> Any:
        super().forward(x)


VALUES = "the line looks at values of tensors, which are not known before it runs. Rewrite it without a branch"
BATCH = "its forward fixes the batch size. Take it from the input (x.shape[0], or -1 in a reshape)"
CHANCE = "draws random numbers in evaluation mode, so no two runs agree. Draw them only where self.training is true."
MASK = "returns depends on the values of the image. Keep all positions (torch.where and a product with a mask do)."

CASES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    # A network, a pattern for how the message begins, and the words that follow.
    "a branch": (
        lambda: Framed(branches),
        rf"Framed cannot be traced at {HERE}:{LINE} \(`if x.mean\(\) > 0:`\): ",
        VALUES,
    ),
    "a number": (
        lambda: Framed(counts),
        rf"Framed cannot be traced at {HERE}:{LINE} \(`return x\[:, : int\(x.max\(\)\) \+ 1\]`\): ",
        VALUES,
    ),
    "a mask": (
        lambda: Framed(lambda m, x: x[x > 0].view(1, -1, 1, 1) + x),
        r"index \(\w+.py:\d+\): how much index ",
        MASK,
    ),
    "the places of non-zeros": (
        lambda: Framed(lambda m, x: x + x.nonzero().sum()),
        r"nonzero \(.*\): how much nonzero ",
        MASK,
    ),
    "a fixed batch": (
        lambda: Framed(lambda m, x: x.view(2, 8, 8, 8)),
        rf"Framed cannot be traced at {HERE}:{LINE} \(`.*view\(2, 8, 8, 8\).*`\): ",
        BATCH,
    ),
    "a loop over images": (
        lambda: Framed(lambda m, x: torch.stack([x[i] for i in range(len(x))])),
        "Framed .*: ",
        BATCH,
    ),
    "noise": (lambda: Framed(lambda m, x: x + torch.randn_like(x)), r"randn_like \(\w+.py:\d+\): randn_like ", CHANCE),
    "random factors": (lambda: Framed(lambda m, x: x * torch.rand(8, 1, 1)), r"rand \(\w+.py:\d+\): rand ", CHANCE),
    "two images": (
        lambda: TwoImages(lambda m, x: x),
        "",
        "TwoImages has 2 inputs (left, right); a classifier takes one image tensor. Give the others default values",
    ),
    "a write that another sees": (
        lambda: Framed(writes),
        r"fill_ \(\w+.py:\d+\): fill_ ",
        "writes in place into a tensor that another one shares; write out of place",
    ),
    "autocast": (
        lambda: Framed(in_autocast),
        "Framed cannot be traced: ",
        "wrap_with_autocast runs operators of its own, which are not looked into. Take it out of the model's forward",
    ),
    "other channels": (
        lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(5, 4, 3))),
        r"Sequential cannot be traced in 1\.0: RuntimeError: .*expected.* to have 5 channels, but got 4.*\. ",
        "It is given float32 images [N, 3, 8, 8].",
    ),
    "an error of its own": (
        lambda: Framed(lambda m, x: 1 / 0),
        rf"Framed cannot be traced at {HERE}:{LINE} \(`.*1 / 0.*`\): ",
        "ZeroDivisionError: division by zero. It is given float32 images [N, 3, 8, 8].",
    ),
    "no logits": (
        lambda: ReturnsNothing(lambda m, x: x),
        "the model must return its logits, ",
        "a tensor [N, classes] that depends on the image; it returns NoneType.",
    ),
    "a feature map": (
        lambda: conv(3, 8),
        "the model must return its logits, ",
        "[N, classes], first where it returns several",
    ),
}


def in_autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.relu(m.stem[0](x[:, :3])).float()


@pytest.mark.parametrize("kind", CASES)
def test_refused(kind: str) -> None:
    make, begins, words = CASES[kind]
    with pytest.raises(ValueError) as error:
        mecdeploy.prepare(make(), EIGHT_BITS, spec_for())
    message = str(error.value)
    assert re.match(begins + re.escape(words), message), message
    assert "\n" not in message


def test_what_torch_onnx_cannot_write_is_refused_at_export(tmp_path: Path) -> None:
    network = settle(Framed(lambda m, x: torch.linalg.svd(x)[1].unsqueeze(-1)), spec_for())
    model, _ = make_one(network)
    with pytest.raises(ValueError) as error:
        mecdeploy.export(model, out=tmp_path / "model.onnx")
    message = str(error.value)
    assert message.startswith("linalg_svd: torch.onnx cannot write this island (")
    assert "No ONNX function found for" in message and "\n" not in message
    assert message.endswith("Rewrite the operator with others that ONNX knows.")


def one_row(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.layer(x.flatten(2))).view(x.size(0), 8, 8, 8)


IN_FLOAT: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    # A network, its operator without a kernel, and why it has none.
    "conv1d": (lambda: Framed(one_row, layer=nn.Conv1d(8, 8, 3, padding=1)), "conv1d", "only two-dimensional"),
    "transposed": (
        lambda: Framed(lambda m, x: F.relu(m.layer(x)), layer=nn.ConvTranspose2d(8, 8, 2, 2)),
        "conv_transpose2d",
        "transposed convolutions have none",
    ),
    "conv3d": (
        lambda: Framed(lambda m, x: m.layer(x.unsqueeze(1)).squeeze(1), layer=nn.Conv3d(1, 1, 3, padding=1)),
        "conv3d",
        "only two-dimensional",
    ),
}


@pytest.mark.parametrize("kind", IN_FLOAT)
def test_layers_without_a_kernel_are_refused(kind: str) -> None:
    make, operator, reason = IN_FLOAT[kind]
    refusal = rf"^layer \(\w+.py:\d+\): {operator} has no integer kernel \({reason}"
    with pytest.raises(ValueError, match=refusal) as error:
        mecdeploy.prepare(make(), EIGHT_BITS, spec_for())
    assert str(error.value).endswith('To keep it in float, list it: quant.float_layers = ["layer"].')


def test_layers_without_a_kernel_work_once_they_are_listed(tmp_path: Path) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.up(F.max_pool2d(x, 2)))
        gate = torch.sigmoid(m.over_channels(y.mean((2, 3)).unsqueeze(1))).view(-1, 8, 1, 1)
        return m.last(y * gate)

    layers = {"up": nn.ConvTranspose2d(8, 8, 2, 2), "over_channels": nn.Conv1d(1, 1, 3, padding=1), "last": conv()}
    config = QuantConfig(weight_bits=8, act_bits=8, float_layers=("up", "over_*"))
    model = travel(Framed(body, **layers), tmp_path, config=config)
    assert {"conv_transpose2d", "conv1d"} <= operators_in_float(model)
    assert "listed under quant.float_layers" in {island.reason for island in model.islands().values()}
    assert {"stem.0", "last", "head"} <= set(model.units())


def test_an_integer_layer_may_stay_in_float_too(tmp_path: Path) -> None:
    layers = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv())
    config = QuantConfig(weight_bits=8, act_bits=8, float_layers=("layers.[012]",))
    model = travel(Framed(lambda m, x: m.layers(x), layers=layers), tmp_path, config=config)
    assert operators_in_float(model) == {"conv2d", "batch_norm", "relu"}
    assert "layers.3" in model.units()


def test_a_pattern_that_matches_nothing() -> None:
    config = QuantConfig(float_layers=("stem.00",))
    with pytest.raises(ValueError, match="quant.float_layers: 'stem.00' matches no operator. Did you mean 'stem.0'"):
        mecdeploy.prepare(Framed(lambda m, x: x), config, spec_for())


def test_a_network_for_other_images() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, CLASSES))
    with pytest.raises(ValueError, match=r"^Sequential cannot be traced in 2: .*\[N, 3, 8, 8\]\.$"):
        mecdeploy.prepare(network, EIGHT_BITS, spec_for())
