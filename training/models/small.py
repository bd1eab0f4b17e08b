"""Residual nets for small images, and the stem that lets larger nets read small images."""

from __future__ import annotations

from torch import Tensor, nn

SMALL_DEPTHS = {f"resnet{depth}": depth for depth in (8, 14, 20, 32, 44, 56)}


class ResidualBlock(nn.Module):
    """relu(bn(conv3x3(relu(bn(conv3x3(x))))) + shortcut(x)): [N, in, H, W] -> [N, out, H/stride, W/stride].

    The shortcut is the identity where shapes agree and a 1x1 convolution with BatchNorm where they do not (option B).
    Source: He et al. 2015 (arXiv:1512.03385), sec. 3.3 and 4.2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """One block; shapes as above."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        result: Tensor = self.relu(self.bn2(self.conv2(out)) + shortcut)
        return result


class SmallResNet(nn.Module):
    """Residual net for small images: 3x3 stem, three stages of n blocks at widths 16, 32, 64, global average, linear.

    depth: 6n + 2 weighted layers (8, 14, 20, 32, 44, 56, ...). Input [N, channels, H, W], output logits [N, classes].
    He et al. use parameter-free shortcuts here (option A); these are projections (option B), which is one convolution
    that an integer kernel runs instead of a strided slice and a zero pad. resnet20 so has 2,752 weights more (1%).
    Weights are drawn as in He et al. 2015 (arXiv:1502.01852), fan-out; BatchNorm starts at 1 and 0.
    Source: He et al. 2015 (arXiv:1512.03385), sec. 4.2.
    """

    def __init__(self, depth: int, *, num_classes: int, channels: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        assert blocks > 0 and rest == 0, f"depth {depth} is not 6n + 2"
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _draw_weights(module)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised float images [N, channels, H, W] to logits [N, classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.flatten(self.avgpool(x)))
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = ResidualBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(ResidualBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def _draw_weights(conv: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def small_stem(channels: int, width: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the image's size: [N, channels, H, W] -> [N, width, H, W]."""
    conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
    _draw_weights(conv)
    return conv
