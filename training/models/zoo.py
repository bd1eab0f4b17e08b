"""Every classifier of torchvision, without pretrained weights (published.py fetches those)."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from mecdeploy.training.config import ModelConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.models.fitting import fit_channels
from mecdeploy.training.models.probing import forward_shapes_only, smallest_side, succeeds
from mecdeploy.training.models.small import small_stem

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
_RESNETS = ("resnet", "resnext", "wide_resnet")
_POSITIONS = "encoder.pos_embedding"  # of torchvision's VisionTransformer
_MAXVIT_SIDE = 224  # 7 positions a window after 5 halvings


def torchvision_names() -> tuple[str, ...]:
    """Every classification network of the installed torchvision, by name."""
    import torchvision.models as zoo  # takes a second to import, which the small networks need not pay

    return tuple(zoo.list_models(module=zoo))


def torchvision_network(config: ModelConfig, *, num_classes: int, channels: int, height: int, width: int) -> nn.Module:
    """The named network as published, with fresh weights: auxiliary classifiers off, dropout and the like as they are.

    config.stem, channels, height, width: as in `build_model`. Networks with a fixed image size are made for this one.
    Raises TrainingError for a size that the network cannot take, naming one that it can, and for a small stem where
    there is none.
    """
    import torchvision.models as zoo

    name = config.name
    options = _options(name, height, width)
    small = _has_small_stem(name) and (
        config.stem == "small" or (config.stem == "auto" and max(height, width) <= SMALL_STEM_UP_TO)
    )
    if config.stem == "small" and not small:
        raise TrainingError(
            f"model.stem is 'small', but {name} has only the published stem; use auto or standard. "
            "The ResNets, ResNeXts and mobilenet_v2 have a small one."
        )
    if small and name == "mobilenet_v2":
        options["inverted_residual_setting"] = _MOBILENET_SMALL_STAGES
    model: nn.Module = zoo.get_model(name, weights=None, num_classes=num_classes, **options)
    if small:
        _replace_stem(model, channels)
    else:
        fit_channels(model, channels, name)
    _require_takes(model, name, channels, height, width)
    return model


def _has_small_stem(name: str) -> bool:
    return name == "mobilenet_v2" or name.startswith(_RESNETS)


def _replace_stem(model: nn.Module, channels: int) -> None:
    if hasattr(model, "conv1"):
        model.conv1 = small_stem(channels, 64)
        model.maxpool = nn.Identity()
    else:
        model.get_submodule("features.0").register_module("0", small_stem(channels, 32))


def _options(name: str, height: int, width: int) -> dict[str, object]:
    """Arguments of torchvision's constructor, beyond the classes."""
    if name in ("googlenet", "inception_v3"):
        # init_weights: the published start, and what torchvision warns of when it is not said
        return {"aux_logits": False, "transform_input": False, "init_weights": True}
    if name.startswith("vit_"):
        patch = int(name.rsplit("_", 1)[1])
        if height != width or height % patch:
            near = [side for side in (height // patch * patch, (height // patch + 1) * patch) if side]
            raise TrainingError(
                f"{name} cannot take images of {height}x{width} pixels: it reads squares whose side is a multiple of "
                f"{patch}. Set data.image_size to {' or '.join(map(str, near))}."
            )
        return {"image_size": height}
    if name == "maxvit_t":
        if height % _MAXVIT_SIDE or width % _MAXVIT_SIDE:
            raise TrainingError(
                f"{name} cannot take images of {height}x{width} pixels: its windows fit sides that are multiples of "
                f"{_MAXVIT_SIDE}. Set data.image_size to {_MAXVIT_SIDE}."
            )
        return {"input_size": (height, width)}
    return {}


def _require_takes(model: nn.Module, name: str, channels: int, height: int, width: int) -> None:
    try:
        forward_shapes_only(model, (2, channels, height, width))
    except Exception as error:

        def takes(side: int) -> bool:
            return succeeds(lambda: forward_shapes_only(model, (2, channels, side, side)))

        smallest = smallest_side(takes, above=min(height, width))
        if smallest is None:
            raise
        raise TrainingError(
            f"{name} cannot take images of {height}x{width} pixels; the smallest it takes are {smallest}x{smallest}. "
            f"Set data.image_size to {smallest} or more."
        ) from error


def fit_positions(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """A vision transformer's tensors with the position embedding interpolated to the network's image size.

    None where nothing has to be done, and for every other network.
    """
    saved = tensors.get(_POSITIONS)
    if saved is None or type(model).__name__ != "VisionTransformer":
        return None
    if saved.shape == model.get_parameter(_POSITIONS).shape:
        return None
    from torchvision.models.vision_transformer import interpolate_embeddings

    try:
        resized = interpolate_embeddings(model.image_size, model.patch_size, OrderedDict(tensors))
    except ValueError:
        return None  # positions of no square: of another network
    return dict(resized)
