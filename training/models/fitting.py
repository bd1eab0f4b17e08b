"""Networks made for other images or other classes: the first convolution and the classifier are changed in place.

In place, since a layer may be of a subclass with a forward of its own (timm's convolutions with TensorFlow's padding).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mecdeploy.training.errors import TrainingError


def first_convolution(model: nn.Module) -> str | None:
    """Name of the first Conv2d, in the order in which modules were made; None where there is none."""
    return next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)


def classifier(model: nn.Module, classes: int | None = None) -> str | None:
    """Name of the last Linear, or of the last Conv2d where there is no Linear (SqueezeNet), with `classes` outputs.

    classes: None for any number. None where no layer has that many outputs.
    """
    for kind, outputs in ((nn.Linear, "out_features"), (nn.Conv2d, "out_channels")):
        layers = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
        fitting: list[str] = [name for name, layer in layers.items() if classes in (None, getattr(layer, outputs))]
        if fitting:
            return fitting[-1]
    return None


def spread_over_channels(weight: Tensor, channels: int) -> Tensor:
    """A convolution's weight for other image channels: [O, C, h, w] -> [O, channels, h, w].

    Each new channel gets the sum over the old ones / channels, so that an image whose channels are all alike (a
    grayscale one) gives what it gave before.
    """
    return (weight.sum(1, keepdim=True) / channels).expand(-1, channels, -1, -1).contiguous()


@torch.no_grad()
def fit_channels(model: nn.Module, channels: int, name: str) -> None:
    """Let the first convolution read `channels` image channels. name: of the network, for messages.

    A network without Conv2d, or with one that takes its channels from the first images (LazyConv2d), is left alone.
    Raises TrainingError for a grouped first convolution.
    """
    first = first_convolution(model)
    conv = None if first is None else model.get_submodule(first)
    if not isinstance(conv, nn.Conv2d) or conv.in_channels in (0, channels):
        return
    if conv.groups != 1:
        raise TrainingError(
            f"{name}: the first convolution {first} reads {conv.in_channels} channels in {conv.groups} groups, the "
            f"images have {channels}. Make a network for {channels} channels."
        )
    conv.weight = nn.Parameter(spread_over_channels(conv.weight, channels))
    conv.in_channels = channels


@torch.no_grad()
def fit_classes(model: nn.Module, outputs: int, classes: int, name: str) -> None:
    """Give the classifier, which has `outputs` logits, `classes` of them, with fresh random weights.

    Raises TrainingError where no layer has `outputs` outputs. name: of the network, for messages.
    """
    found = classifier(model, outputs)
    if found is None:
        raise TrainingError(
            f"{name} gives {outputs} logits, the data has {classes} classes, and no layer has {outputs} outputs. "
            "Give the factory a parameter num_classes."
        )
    layer = model.get_submodule(found)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    layer.weight = nn.Parameter(layer.weight.new_empty((classes, *layer.weight.shape[1:])))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(classes))
    if isinstance(layer, nn.Linear):
        layer.out_features = classes
    else:
        layer.out_channels = classes
    layer.reset_parameters()
