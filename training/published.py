"""Weights that torchvision publishes for its classifiers, fetched once into torch.hub's cache."""

from __future__ import annotations

import pickle
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.initial import UNREADABLE, Weights
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.models.zoo import torchvision_names

# Published with transform_input, which maps the usual normalisation to (x - 0.5) / 0.5; ours reads that at once.
_TRANSFORM_INPUT = ("googlenet", "inception_v3")


def published_weights(model: str, name: str) -> Weights:
    """The weights `name` (DEFAULT, IMAGENET1K_V1, ...) of a torchvision classifier, with their normalisation.

    Downloads them unless torch.hub's cache has them. Raises TrainingError for a network or a name that has none, and
    for a download that fails.
    """
    if model not in torchvision_names():
        raise TrainingError(
            f"weights is {name!r}, but {model} has no published weights; name a file (.safetensors, .pth)."
        )
    import torchvision.models as zoo

    known = zoo.get_model_weights(model)
    if name not in known.__members__:
        raise TrainingError(f"weights is {name!r}; {model} has {', '.join(known.__members__)}. A file ends in .pth.")
    member = known[name]
    return Weights(
        tensors=_fetch(member, model), source=f"{member.name} of {model}", input=_normalization(model, member)
    )


def _fetch(member: Any, model: str) -> dict[str, torch.Tensor]:
    try:
        with redirect_stdout(sys.stderr):  # where torch.hub says what it downloads
            state = member.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (*UNREADABLE, pickle.UnpicklingError) as error:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(member.url).name
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TrainingError(
            f"{member.name} of {model} could not be fetched from {member.url} ({reason}). Download it where there is a "
            f"network and save it as {cached}."
        ) from error
    return dict(state)


def _normalization(model: str, member: Any) -> InputSpec:
    """Geometry is not part of it: 1x1, until it is fitted to the images."""
    transforms = member.transforms()
    mean, std = ([0.5] * 3, [0.5] * 3) if model in _TRANSFORM_INPUT else (transforms.mean, transforms.std)
    return InputSpec.from_channels(height=1, width=1, mean=[255 * m for m in mean], std=[255 * s for s in std])
