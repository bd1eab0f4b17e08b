"""From the name in a config to a network that fits the images and the classes."""

from __future__ import annotations

import difflib

from torch import nn

from mecdeploy.training.config import ModelConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.models.small import SMALL_DEPTHS, SmallResNet
from mecdeploy.training.models.user_file import user_network
from mecdeploy.training.models.zoo import torchvision_names, torchvision_network
from mecdeploy.training.names import user_file


def available_models() -> tuple[str, ...]:
    """Every network that `build_model` knows by name: ours, the smallest first, then torchvision's."""
    return (*SMALL_DEPTHS, *torchvision_names())


def build_model(config: ModelConfig, *, num_classes: int, channels: int, height: int, width: int) -> nn.Module:
    """Make the named network with fresh random weights (from torch's global generator), in training mode.

    The network reads normalised float images [N, channels, height, width] and gives logits [N, num_classes]; channels
    is 1 or 3, height and width are in pixels.
    config.name: resnet8 to resnet56; a classifier of torchvision; "path/to/file.py:factory" executes that file.
    config.stem: "small" is a 3x3 stride-1 stem without max pooling (torchvision's ResNets), or strides of 1 in the stem
    and in the first stage that would halve the image (mobilenet_v2); "standard" is as published; "auto" is small up to
    64 pixels where there is a small stem. resnet8 to resnet56 are published with a small stem and have no other.
    TrainingError for an unknown name, fewer than 2 classes, other numbers of channels, a stem that the network does not
    have, images that it cannot take, and whatever goes wrong in a user's file.
    """
    if num_classes < 2:
        raise TrainingError(f"{config.name}: the number of classes is {num_classes}; a classifier needs at least 2.")
    if channels not in (1, 3):
        raise TrainingError(f"{config.name}: images have {channels} channels; use 1 (grayscale) or 3 (RGB).")
    named = user_file(config.name)
    if named is not None:
        if config.stem == "small":
            raise TrainingError(
                f"model.stem is 'small', but {config.name} has the stem that its file gives it; drop it."
            )
        file, factory = named
        return user_network(
            file, factory, num_classes=num_classes, channels=channels, height=height, width=width
        ).train()
    if config.name in SMALL_DEPTHS:
        return SmallResNet(SMALL_DEPTHS[config.name], num_classes=num_classes, channels=channels)
    if config.name not in torchvision_names():
        raise _unknown(config.name)
    return torchvision_network(config, num_classes=num_classes, channels=channels, height=height, width=width)


def _unknown(name: str) -> TrainingError:
    if name.endswith(".py"):
        return TrainingError(f"model.name is {name!r}; name the function or class that makes the network: {name}:NAME.")
    close = difflib.get_close_matches(name.lower(), available_models(), n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return TrainingError(
        f"model.name is {name!r}, which is no known model.{hint} Choose one of {', '.join(SMALL_DEPTHS)}, a classifier "
        "of torchvision (torchvision.models.list_models names them), or a file of yours: path/to/file.py:factory."
    )
