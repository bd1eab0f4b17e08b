"""The networks a run can name: small residual nets and torchvision's, as plain float modules that torch.fx traces."""

from __future__ import annotations

import difflib

from torch import Tensor, nn

from mecdeploy.training.config import ModelConfig
from mecdeploy.training.errors import TrainingError

SMALL_STEM_UP_TO = 64  # pixels; an image of ImageNet's stem would leave a 64-pixel side only 16 positions

# t, c, n, s of Sandler et al. 2018 (arXiv:1801.04381), table 2, with the first stride-2 stage at stride 1.
_MOBILENET_SMALL_STAGES = [
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]


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


def _stem(channels: int, width: int, *, kernel: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
    _draw_weights(conv)
    return conv


def _torchvision(name: str, classes: int, **options: object) -> nn.Module:
    import torchvision.models as zoo  # takes a second to import, which the small networks need not pay

    model: nn.Module = getattr(zoo, name)(weights=None, num_classes=classes, **options)
    return model


def _torchvision_resnet(name: str, classes: int, channels: int, small: bool) -> nn.Module:
    model = _torchvision(name, classes)
    if small:
        model.conv1 = _stem(channels, 64, kernel=3, stride=1)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = _stem(channels, 64, kernel=7, stride=2)
    return model


def _mobilenet_v2(classes: int, channels: int, small: bool) -> nn.Module:
    stages = _MOBILENET_SMALL_STAGES if small else None
    model = _torchvision("mobilenet_v2", classes, inverted_residual_setting=stages)
    if small or channels != 3:
        first = model.get_submodule("features.0")
        first.register_module("0", _stem(channels, 32, kernel=3, stride=1 if small else 2))
    return model


_SMALL_DEPTHS = {f"resnet{depth}": depth for depth in (8, 14, 20, 32, 44, 56)}
_TORCHVISION_RESNETS = ("resnet18", "resnet34", "resnet50")


def available_models() -> tuple[str, ...]:
    """Every name that `build_model` knows, the smallest first."""
    return (*_SMALL_DEPTHS, *_TORCHVISION_RESNETS, "mobilenet_v2")


def build_model(config: ModelConfig, *, num_classes: int, channels: int, height: int, width: int) -> nn.Module:
    """Make the named network with fresh random weights (from torch's global generator), in training mode.

    The network reads normalised float images [N, channels, height, width] and gives logits [N, num_classes]; channels
    is 1 or 3, height and width are in pixels.
    config.stem: "small" is a 3x3 stride-1 stem without max pooling (resnet18, 34, 50), or strides of 1 in the stem and
    in the first stage that would halve the image (mobilenet_v2); "standard" is as published; "auto" is small up to 64
    pixels. resnet8 to resnet56 are published with a small stem and have no other.
    TrainingError for an unknown name, fewer than 2 classes, or other numbers of channels.
    """
    if config.name not in available_models():
        close = difflib.get_close_matches(config.name.lower(), available_models(), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        known = ", ".join(available_models())
        raise TrainingError(f"model.name is {config.name!r}, which is no known model.{hint} Choose one of {known}.")
    if channels not in (1, 3):
        raise TrainingError(f"{config.name}: images have {channels} channels; use 1 (grayscale) or 3 (RGB).")
    if num_classes < 2:
        raise TrainingError(f"{config.name}: the number of classes is {num_classes}; a classifier needs at least 2.")
    small = config.stem == "small" or (config.stem == "auto" and max(height, width) <= SMALL_STEM_UP_TO)
    if config.name in _SMALL_DEPTHS:
        return SmallResNet(_SMALL_DEPTHS[config.name], num_classes=num_classes, channels=channels)
    if config.name in _TORCHVISION_RESNETS:
        return _torchvision_resnet(config.name, num_classes, channels, small)
    return _mobilenet_v2(num_classes, channels, small)
