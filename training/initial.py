"""Weights to start from: a checkpoint of ours, anybody's state dict, or what torchvision published (published.py)."""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mecdeploy.training.checkpoint import is_checkpoint, read_checkpoint
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.models.fitting import classifier, first_convolution, spread_over_channels
from mecdeploy.training.models.zoo import fit_positions

UNREADABLE = (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError)
"""What torch.load raises for a file that is truncated or foreign, beside UnpicklingError."""

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
_PREFIXES = ("module.", "model.", "_orig_mod.")
_PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt")
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # GoogLeNet's and Inception's further classifiers, for training alone
_OLD_DENSENET = re.compile(
    r"(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:.+))"
)  # as torchvision published them


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Tensors by name, on the CPU, and where they are from, as messages call it.

    input: the normalisation that they were trained with. class_names: by class index. None and () where nobody knows.
    """

    tensors: Mapping[str, Tensor]
    source: str
    input: InputSpec | None = None
    class_names: tuple[str, ...] = ()


def load_initial_weights(model: nn.Module, path: Path) -> list[str]:
    """Fill the full-precision network from a file: `read_weights`, then `fill`."""
    return fill(model, read_weights(path))


def read_weights(path: Path) -> Weights:
    """The tensors of a file.

    path: a checkpoint of ours (its full-precision weights), a .safetensors state dict, or a .pth/.pt one, which may lie
    under "state_dict" or "model". Pickles are read as tensors only.
    Raises TrainingError for a file that is missing, truncated or foreign.
    """
    if path.is_dir():
        raise TrainingError(f"weights is the folder {path}; name a file in it, such as checkpoint-final.safetensors.")
    if not path.is_file():
        raise TrainingError(f"weights is {path}, which does not exist; check the path.")
    if path.suffix.lower() == ".safetensors":
        if is_checkpoint(path):
            checkpoint = read_checkpoint(path)
            return Weights(
                tensors=checkpoint.section("float"),
                source=str(path),
                input=InputSpec(**checkpoint.header["input"]),
                class_names=tuple(checkpoint.header["class_names"]),
            )
        return Weights(tensors=load_file(path), source=str(path))
    if path.suffix.lower() not in _PICKLE_SUFFIXES:
        raise TrainingError(f"weights is {path}; a state dict ends in .safetensors, {', '.join(_PICKLE_SUFFIXES)}.")
    return Weights(tensors=_unpickled(path), source=str(path))


def fill(model: nn.Module, weights: Weights, *, whole: bool = False) -> list[str]:
    """Give the network these weights; all of them or, where they do not fit, none.

    Names may start with "module.", "model." or "_orig_mod.". Auxiliary classifiers that the network lacks are left out.
    A classifier for another number of classes stays as it is in the network, and the first convolution of an RGB
    network is summed over its channels for grayscale images: returns a sentence about each.
    whole: a classifier for another number of classes is refused.
    Raises TrainingError for names or shapes that do not fit, and for numbers that are not finite.
    """
    wanted = model.state_dict()
    tensors = _named_alike(weights.tensors, wanted)
    tensors, afresh, notes = _fitted(model, tensors, wanted, weights.source)
    if whole and afresh:
        raise TrainingError(
            f"{notes[0].rpartition(': ')[0]}; with data.labels none the weights have to teach, so use weights of "
            "these classes."
        )
    # Counts of batches are absent from old files, and no arithmetic of ours reads them.
    missing = [
        name
        for name in wanted
        if name not in tensors and name not in afresh and not name.endswith(".num_batches_tracked")
    ]
    unexpected = [name for name in tensors if name not in wanted]
    if missing or unexpected:
        raise TrainingError(
            f"weights {weights.source} do not fit the model: {_listed('missing', missing)}; "
            f"{_listed('unexpected', unexpected)}. Set model.name (and model.stem) to the network that was saved."
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise TrainingError(
                f"weights {weights.source}: {name} is {list(tensor.shape)}, the model needs "
                f"{list(wanted[name].shape)}. Use weights of the same model, stem (model.stem) and image channels."
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise TrainingError(
                f"weights {weights.source}: {name} holds NaN or infinity; use weights of a run that converged."
            )
    load_tensors(model, tensors, strict=False)
    return notes


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """As load_state_dict, of tensors saved by this version of the network.

    Modules that count their versions (torchvision's MNASNet) refuse a plain dict, which has none.
    """
    state = OrderedDict(tensors)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state, strict=strict)


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of here either loads, or is refused below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TrainingError(
            f"weights {path} holds more than tensors, or is no PyTorch file; save model.state_dict() and use that file."
        ) from error
    except UNREADABLE as error:
        raise TrainingError(f"weights {path} cannot be read as a PyTorch file; it is truncated or foreign.") from error
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        kind = type(loaded).__name__
        raise TrainingError(f"weights {path} holds a {kind}, not a state dict; save model.state_dict().")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        raise TrainingError(f"weights {path} holds no tensors by name; save model.state_dict().")
    return tensors


def _named_alike(tensors: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """The tensors under the names that the network has for them, as far as they can be told."""
    known = set(wanted)
    while tensors and not known & tensors.keys():
        prefix = next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    named = {}
    for name, tensor in tensors.items():
        if name not in known and name.startswith(_AUXILIARY):
            continue
        renamed = _OLD_DENSENET.sub(r"\1\2", name)
        named[name if name in known or renamed not in known else renamed] = tensor
    return named


def _fitted(
    model: nn.Module, tensors: dict[str, Tensor], wanted: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], set[str], list[str]]:
    """The tensors that fit, the names of those left out, and a sentence about each that was changed or left out."""
    afresh: set[str] = set()
    notes = []
    different = {name for name in tensors if name in wanted and tensors[name].shape != wanted[name].shape}
    head = _classifier_names(model) & different
    if head and all(tensors[name].shape[1:] == wanted[name].shape[1:] for name in head):
        name = min(head)
        classes, saved = len(wanted[name]), len(tensors[name])
        notes.append(
            f"{source} classifies {saved} classes, the data has {classes}: {name.rpartition('.')[0]} starts afresh."
        )
        afresh = _classifier_names(model)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in afresh}
    stem = f"{first_convolution(model)}.weight"
    if stem in different and _is_rgb_of(tensors[stem].shape, wanted[stem].shape):
        tensors[stem] = spread_over_channels(tensors[stem], 1)
        notes.append(f"{source} reads RGB, the images are grayscale: {stem} is summed over the colours.")
    resized = fit_positions(model, tensors)
    if resized is not None:
        tensors = resized
        notes.append(f"{source} was trained with images of another size: its position embedding is interpolated.")
    return tensors, afresh, notes


def _is_rgb_of(saved: torch.Size, gray: torch.Size) -> bool:
    return len(saved) == 4 and (saved[1], gray[1]) == (3, 1) and (saved[0], *saved[2:]) == (gray[0], *gray[2:])


def class_count(model: nn.Module, weights: Weights) -> int:
    """How many classes the weights tell apart, for a network of their kind. TrainingError if they lack a classifier."""
    name = f"{classifier(model)}.weight"
    tensors = _named_alike(weights.tensors, model.state_dict())
    if name not in tensors:
        raise TrainingError(
            f"weights {weights.source} hold no {name}, so that nobody knows their classes. Set model.name (and "
            "model.stem) to the network that was saved."
        )
    return len(tensors[name])


def _classifier_names(model: nn.Module) -> set[str]:
    name = classifier(model)
    return set() if name is None else {f"{name}.weight", f"{name}.bias"}


def _listed(kind: str, names: list[str], limit: int = 3) -> str:
    if not names:
        return f"nothing {kind}"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{kind} {', '.join(names[:limit])}{more}"
