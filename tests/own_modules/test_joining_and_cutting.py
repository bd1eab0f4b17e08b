"""What moves values without computing them, and padding, all of it on the integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from journey import CLASSES, EIGHT_BITS, FEW_BITS, distance, pictures, settle, spec_for, travel
from networks import Framed, conv, conv_bn_relu
from torch import Tensor, nn
from torch.nn import functional as F

import mecdeploy
from mecdeploy import InputSpec, QuantConfig


@pytest.mark.parametrize("config", [EIGHT_BITS, FEW_BITS], ids=["w8a8", "w2a4"])
def test_concatenations_of_concatenations(config: QuantConfig, tmp_path: Path) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b, c = m.a(x), m.b(x), m.c(x)
        first = torch.cat([a, b, c], 1)
        second = torch.cat([first, F.max_pool2d(x, 3, 1, 1), F.avg_pool2d(x, 3, 1, 1)], 1)
        return m.d(torch.cat((second, torch.concat([a, x], dim=1)), dim=1))

    gate = nn.Sequential(nn.Conv2d(8, 4, 1), nn.Sigmoid())
    network = Framed(body, a=conv_bn_relu(8, 4), b=nn.Conv2d(8, 4, 1), c=gate, d=conv_bn_relu(40, 8))
    assert not travel(network, tmp_path, config=config).islands()


def test_chunk_split_unbind_and_stack(tmp_path: Path) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        c, d, e = torch.split(m.conv(x), [2, 4, 2], dim=1)
        planes = x.unbind(1)
        return torch.cat([a * torch.sigmoid(b), d, c + e[:, :2], torch.stack([planes[0], planes[3]], 1)], 1)

    assert not travel(Framed(body, 12, conv=conv_bn_relu(8, 8)), tmp_path).islands()


REARRANGED: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module]]] = {
    "pixel shuffle": (
        lambda m, x: m.conv(F.pixel_unshuffle(F.pixel_shuffle(F.max_pool2d(x, 2), 2), 2)),
        {"conv": conv_bn_relu(8, 8)},
    ),
    "nearest neighbours": (
        lambda m, x: F.interpolate(F.max_pool2d(x, 4), size=(8, 8)) + m.up(m.conv(F.max_pool2d(x, 2))),
        {"conv": conv_bn_relu(8, 8), "up": nn.Upsample(scale_factor=2)},
    ),
    "pools to a size": (
        lambda m, x: F.adaptive_max_pool2d(x, 4) + F.adaptive_avg_pool2d(F.adaptive_avg_pool2d(m.conv(x), 2), 4),
        {"conv": conv_bn_relu(8, 8)},
    ),
    "largest of all positions": (
        lambda m, x: torch.cat([x.amax((2, 3), keepdim=True), F.adaptive_avg_pool2d(x, 1)], 1)[:, 4:12],
        {},
    ),
    "channel shuffle": (
        lambda m, x: m.conv(m.shuffle(x)),
        {"conv": nn.Conv2d(8, 8, 3, padding=1, groups=4), "shuffle": nn.ChannelShuffle(2)},
    ),
}


@pytest.mark.parametrize("kind", REARRANGED)
def test_rearranged(kind: str, tmp_path: Path) -> None:
    body, layers = REARRANGED[kind]
    assert not travel(Framed(body, **layers), tmp_path).islands()


PADDED: dict[str, Callable[[], nn.Module]] = {
    "F.pad on two sides": lambda: Framed(lambda m, x: m.conv(F.pad(x, (0, 1, 0, 1))), conv=conv_bn_relu(8, 8, 2)),
    "ZeroPad2d on four": lambda: Framed(
        lambda m, x: m.conv(x), conv=nn.Sequential(nn.ZeroPad2d((1, 2, 0, 1)), nn.Conv2d(8, 8, 3), nn.ReLU())
    ),
    "of signed values, read twice": lambda: Framed(
        lambda m, x: (lambda y: m.b(y) + m.c(y))(F.pad(m.a(x), (2, 1, 1, 0))), a=conv(), b=conv(), c=conv()
    ),
    "same, dilated": lambda: Framed(
        lambda m, x: m.convs(x),
        convs=nn.Sequential(nn.Conv2d(8, 8, 4, padding="same", dilation=2), nn.ReLU(), nn.Conv2d(8, 8, (1, 3))),
    ),
    "dilated groups": lambda: Framed(
        lambda m, x: m.convs(x),
        convs=nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=(3, 2), dilation=2, groups=2), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8)
        ),
        channels=16,
    ),
}


@pytest.mark.parametrize("kind", PADDED)
def test_padded_with_zeros(kind: str, tmp_path: Path) -> None:
    model = travel(PADDED[kind](), tmp_path)
    assert not model.islands()
    assert not [name for name in model.units() if "pad" in name]


def test_padding_that_a_pool_reads_too_stays_in_float(tmp_path: Path) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = F.pad(x, (1, 1, 1, 1), value=0.0)
        return m.a(y) + m.b(F.max_pool2d(y, 3, 1))[:, :, 0:8, 0:8]

    model = travel(Framed(body, a=nn.Conv2d(8, 8, 3), b=conv_bn_relu(8, 8)), tmp_path)
    (island,) = model.islands().values()
    assert (island.operators[0], island.reason) == ("pad", "pad has no integer kernel of its own")


def test_reflected_borders_are_float_and_their_convolution_is_not(tmp_path: Path) -> None:
    convolution = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
    model = travel(Framed(lambda m, x: F.relu(m.conv(x)), conv=convolution), tmp_path)
    ((name, island),) = model.islands().items()
    assert (name, island.operators) == ("conv_2", ("pad",))
    assert island.reason == "only padding height and width with zeros, before a convolution, has an integer kernel"
    assert "conv" in model.units()


class Focus(nn.Module):
    """Every second pixel each way, one behind the other; then one colour alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv_bn_relu(12, 8), nn.Conv2d(1, 8, 3, 2, 1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return self.fc((self.a(torch.cat(parts, 1)) + self.b(x[:, 2:])).mean((2, 3)))


def test_pixels_cut_and_joined(tmp_path: Path) -> None:
    assert not travel(Focus(), tmp_path).islands()


def test_pixels_cut_by_colour_keep_their_colours_normalisation() -> None:
    """Means and deviations so different that one colour's in another's place would show."""
    spec = InputSpec.from_channels(height=8, width=8, mean=(60.0, 120.0, 200.0), std=(30.0, 60.0, 120.0))
    # No padding: there the float network has 0, the folded one the zero point (training/normalization.py).
    network = Focus()
    network.a[0].padding, network.b.padding = (0, 0), (0, 0)
    network.b.kernel_size, network.b.stride = (3, 3), (3, 3)
    network.b.weight = nn.Parameter(torch.randn(8, 1, 3, 3))
    settle(network, spec)
    images = pictures(32)
    model = mecdeploy.prepare(network, EIGHT_BITS, spec)
    mecdeploy.calibrate(model, [images])
    assert distance(network, model, images) < 0.2  # as journey.CLOSE; the wrong colour gives more than 1


def test_one_channel_images(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    )
    assert not travel(network, tmp_path, channels=1, size=12).islands()
    assert spec_for(12, 1).channels == 1
