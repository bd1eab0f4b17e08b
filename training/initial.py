"""Weights to start from: a checkpoint of ours, or anybody's state dict."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mecdeploy.training.checkpoint import is_checkpoint, read_checkpoint
from mecdeploy.training.errors import TrainingError

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
_PREFIXES = ("module.", "_orig_mod.")
_PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt")


def load_initial_weights(model: nn.Module, path: Path) -> None:
    """Fill the full-precision network from a file.

    path: a checkpoint of ours (its full-precision weights), a .safetensors state dict, or a .pth/.pt one, which may lie
    under "state_dict" or "model" and whose names may start with "module.". Pickles are read as tensors only.
    Raises TrainingError for a file that is missing, truncated or foreign, and for names or shapes that do not fit.
    """
    if path.is_dir():
        raise TrainingError(f"init is the folder {path}; name a file in it, such as checkpoint-final.safetensors.")
    if not path.is_file():
        raise TrainingError(f"init is {path}, which does not exist; check the path.")
    _fill(model, _read(path), path)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix.lower() == ".safetensors":
        if is_checkpoint(path):
            return read_checkpoint(path).section("float")
        return _unprefixed(load_file(path))
    if path.suffix.lower() not in _PICKLE_SUFFIXES:
        raise TrainingError(f"init is {path}; a state dict ends in .safetensors, {', '.join(_PICKLE_SUFFIXES)}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of here either loads, or is refused below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TrainingError(
            f"init {path} holds more than tensors, or is no PyTorch file; save model.state_dict() and use that file."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise TrainingError(f"init {path} cannot be read as a PyTorch file; it is truncated or foreign.") from error
    return _unprefixed(_unwrapped(loaded, path))


def _unwrapped(loaded: Any, path: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise TrainingError(f"init {path} holds a {type(loaded).__name__}, not a state dict; save model.state_dict().")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        raise TrainingError(f"init {path} holds no tensors by name; save model.state_dict().")
    return tensors


def _unprefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    wanted = model.state_dict()
    # Counts of batches are absent from old files, and no arithmetic of ours reads them.
    missing = [name for name in wanted if name not in tensors and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in tensors if name not in wanted]
    if missing or unexpected:
        raise TrainingError(
            f"init {path} does not fit the model: {_listed('missing', missing)}; {_listed('unexpected', unexpected)}. "
            "Set model.name (and model.stem) to the network that was saved."
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise TrainingError(
                f"init {path}: {name} is {list(tensor.shape)}, the model needs {list(wanted[name].shape)}. "
                "Use weights of the same model, number of classes and image channels."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TrainingError(f"init {path}: {name} holds NaN or infinity; use weights of a run that converged.")
    model.load_state_dict(dict(tensors), strict=False)


def _listed(kind: str, names: list[str], limit: int = 3) -> str:
    if not names:
        return f"nothing {kind}"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{kind} {', '.join(names[:limit])}{more}"
