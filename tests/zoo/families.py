"""Small members of torchvision's families: their blocks as published, few and narrow, for small images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torchvision.models as zoo
from torch import nn
from torchvision.models import convnext, densenet, efficientnet, maxvit, swin_transformer, vision_transformer

CLASSES = 5
SIDE = 32  # pixels


def efficient_net() -> nn.Module:
    narrow = partial(efficientnet.MBConvConfig, width_mult=1.0, depth_mult=1.0)
    settings = [narrow(1, 3, 1, 8, 8, 1), narrow(4, 3, 2, 8, 16, 2), narrow(4, 5, 2, 16, 24, 1)]
    return efficientnet.EfficientNet(settings, dropout=0.2, num_classes=CLASSES, last_channel=48)


def efficient_net_v2() -> nn.Module:
    settings = [efficientnet.FusedMBConvConfig(4, 3, 2, 24, 16, 1), efficientnet.MBConvConfig(4, 3, 2, 16, 24, 1)]
    return efficientnet.EfficientNet(settings, dropout=0.2, num_classes=CLASSES, last_channel=48)


def mobile_net_v3() -> nn.Module:
    return zoo.mobilenet_v3_small(num_classes=CLASSES, width_mult=0.5)


def dense_net() -> nn.Module:
    return densenet.DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=CLASSES)


def shuffle_net() -> nn.Module:
    return zoo.ShuffleNetV2([2, 2, 2], [16, 32, 48, 64, 96], num_classes=CLASSES)


def conv_next() -> nn.Module:
    blocks = [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 2)]
    return convnext.ConvNeXt(blocks, num_classes=CLASSES)


def vision_transformer_() -> nn.Module:
    return vision_transformer.VisionTransformer(SIDE, 8, 2, 2, 32, 64, num_classes=CLASSES)


def swin(*, version: int) -> nn.Module:
    parts = {}
    if version == 2:
        parts = {
            "block": swin_transformer.SwinTransformerBlockV2,
            "downsample_layer": swin_transformer.PatchMergingV2,
        }
    return swin_transformer.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [2, 2], num_classes=CLASSES, **parts)


def max_vit() -> nn.Module:
    return maxvit.MaxVit(
        input_size=(SIDE, SIDE),
        stem_channels=16,
        partition_size=2,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=CLASSES,
    )


# The families that are left out have no small member: AlexNet and VGG come with classifiers of 50 million weights and
# more, Inception with images of 75 pixels. ResNet and MobileNetV2 are in tests/parity; the slow tests have all of them.
INTEGER: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "densenet": dense_net,
        "efficientnet": efficient_net,
        "efficientnet_v2": efficient_net_v2,
        "googlenet": partial(zoo.googlenet, num_classes=CLASSES, aux_logits=False, init_weights=False),
        "mnasnet": partial(zoo.MNASNet, 0.25, num_classes=CLASSES),
        "mobilenet_v3": mobile_net_v3,
        "regnet_y": partial(zoo.regnet_y_400mf, num_classes=CLASSES),
        "shufflenet_v2": shuffle_net,
        "squeezenet": partial(zoo.squeezenet1_1, num_classes=CLASSES),
    }
)
"""Every operator of these has an integer kernel."""

WITH_ISLANDS: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "convnext": conv_next,
        "maxvit": max_vit,
        "swin": partial(swin, version=1),
        "swin_v2": partial(swin, version=2),
        "vit": vision_transformer_,
    }
)
"""LayerNorm, softmax and GELU run in float; every layer with weights is an integer kernel."""
