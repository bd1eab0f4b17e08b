"""The network that every tool gets: a ResNet-8 without BatchNorm (folded), its layers exchangeable. torch alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SIDE, CLASSES, WIDTHS = 32, 10, (16, 32, 64)


class Layers:
    """What the network is made of; a tool with layers of its own overrides this."""

    def conv(self, inputs: int, outputs: int, kernel: int, stride: int, *, first: bool = False) -> nn.Module:
        """A convolution with a bias that keeps the side, or halves it."""
        return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)

    def relu(self) -> nn.Module:
        """What follows a convolution or a sum."""
        return nn.ReLU()

    def addend(self) -> nn.Module:
        """What either side of a residual sum goes through."""
        return nn.Identity()

    def pooled(self) -> nn.Module:
        """What the last layer's input goes through."""
        return nn.Identity()

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        """The last layer."""
        return nn.Linear(inputs, outputs)

    def input(self) -> nn.Module:
        """What the image goes through first."""
        return nn.Identity()


class Block(nn.Module):
    """relu(conv(relu(conv(x))) + shortcut(x))."""

    def __init__(self, layers: Layers, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.relu1 = layers.conv(inputs, outputs, 3, stride), layers.relu()
        self.conv2 = layers.conv(outputs, outputs, 3, 1)
        self.shortcut = layers.conv(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()
        self.left, self.right, self.relu2 = layers.addend(), layers.addend(), layers.relu()

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        return self.relu2(self.left(self.conv2(self.relu1(self.conv1(x)))) + self.right(self.shortcut(x)))


class Network(nn.Module):
    """Normalised images, float32 [N, 1, SIDE, SIDE], to logits [N, CLASSES]."""

    def __init__(self, layers: Layers | None = None) -> None:
        super().__init__()
        layers = layers or Layers()
        self.input, self.conv, self.relu = layers.input(), layers.conv(1, WIDTHS[0], 3, 1, first=True), layers.relu()
        narrow = (WIDTHS[0], *WIDTHS)
        self.blocks = nn.Sequential(
            *(Block(layers, narrow[index], width, 2 if index else 1) for index, width in enumerate(WIDTHS))
        )
        self.pool, self.pooled = nn.AdaptiveAvgPool2d(1), layers.pooled()
        self.fc = layers.linear(WIDTHS[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of normalised images."""
        x = self.pool(self.blocks(self.relu(self.conv(self.input(x)))))
        return self.fc(self.pooled(x.flatten(1)))


class Normalized(Layers):
    """With BatchNorm, for training in full precision."""

    def conv(self, inputs: int, outputs: int, kernel: int, stride: int, *, first: bool = False) -> nn.Module:
        """A convolution and its BatchNorm."""
        return nn.Sequential(super().conv(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs))


def folded(module: nn.Module) -> nn.Module:
    """The network with each convolution and its BatchNorm as one convolution, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential) and isinstance(child[-1], nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(child[0].eval(), child[1].eval()))
        else:
            folded(child)
    return module


def load_into(network: nn.Module, folder: Path) -> nn.Module:
    """The trained weights into a network of any layers; what these have beside weights stays as it is."""
    missing = network.load_state_dict(torch.load(folder / "network.pt", weights_only=True), strict=False)
    assert not missing.unexpected_keys
    return network


def fine_tune(
    network: nn.Module,
    folder: Path,
    *,
    epochs: int,
    seed: int,
    rate: float = 0.002,
    data: tuple[Tensor, Tensor] | None = None,
) -> None:
    """SGD in batches of 64, alike for every tool that trains.

    data: images and labels; by default the normalised training images in the folder.
    """
    if data is None:
        data = tuple(torch.load(folder / f"{name}.pt", weights_only=True) for name in ("train", "train_labels"))
    images, labels = data
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=rate, momentum=0.9)
    for _ in range(epochs):
        network.train()
        for batch in torch.randperm(len(images), generator=order).split(64):
            loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
