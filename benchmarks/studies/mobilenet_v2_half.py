"""MobileNetV2 of half width for images of 32x32, a size that two CPU cores can train: model.name FILE.py:make."""

from torch import nn
from torchvision.models import MobileNetV2


def make(num_classes: int) -> nn.Module:
    """Strides of 1 in the stem and the first stage that would halve the image, as model.stem = "small" has them."""
    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    network = MobileNetV2(num_classes=num_classes, width_mult=0.5, inverted_residual_setting=stages)
    stem = network.features.get_submodule("0.0")
    assert isinstance(stem, nn.Conv2d)
    stem.stride = (1, 1)
    return network
