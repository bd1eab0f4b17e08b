"""A network from the user's own file. The file is executed: only a path that the user named gets here."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.models.fitting import fit_channels, fit_classes
from mecdeploy.training.models.probing import smallest_side, succeeds


def user_network(file: Path, factory: str, *, num_classes: int, channels: int, height: int, width: int) -> nn.Module:
    """What the function or class `factory` of a Python file returns, fitted to the images and the classes.

    It is called with those of num_classes, in_channels, channels and image_size (the side; (height, width) where they
    differ) that are among its parameters. Where it has none for the channels, the first convolution is fitted to them;
    where it has none for the classes, the classifier is. The file's folder is importable meanwhile, for its siblings.
    Raises TrainingError, in one sentence, for: a missing file or name, an exception in the user's code (with its
    place), a result that is no nn.Module, images that it cannot take, and an output that is not one
    tensor of logits [N, K].
    """
    name = f"{file}:{factory}"
    if not file.is_file():
        raise TrainingError(f"model.name is {name!r}, and {file} is no file in {Path.cwd()}; check the path.")
    offered = {
        "num_classes": num_classes,
        "in_channels": channels,
        "channels": channels,
        "image_size": height if height == width else (height, width),
    }
    with _importable(file.resolve().parent):
        make = _find(_load(file), file, factory)
        arguments = _arguments(make, offered, name)
        model = _run(lambda: make(**arguments), file, f"{name} failed")
    if not isinstance(model, nn.Module):
        raise TrainingError(f"{name} returned {_kind(model)}, not an nn.Module; return the network itself.")
    if not arguments.keys() & {"in_channels", "channels"}:
        fit_channels(model, channels, name)
    outputs = _count_logits(model, file, name, (2, channels, height, width), fixed="image_size" in arguments)
    if outputs != num_classes:
        if "num_classes" in arguments:
            raise TrainingError(f"{name} was called with num_classes={num_classes}, but gives {outputs} logits.")
        fit_classes(model, outputs, num_classes, name)
    return model


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _load(file: Path) -> ModuleType:
    """Execute the file as a module of a name of its own, so that it hides no other module and is found by pickle."""
    unique = f"mecdeploy_user_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}_{file.stem}"
    spec = importlib.util.spec_from_file_location(unique, file.resolve())
    assert spec is not None and spec.loader is not None, f"{file} ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    _run(lambda: spec.loader.exec_module(module), file, f"{file} cannot be imported")  # type: ignore[union-attr]
    return module


def _find(module: ModuleType, file: Path, factory: str) -> Callable[..., Any]:
    found = getattr(module, factory, None)
    if callable(found):
        return cast("Callable[..., Any]", found)
    if found is not None:
        raise TrainingError(f"{file}:{factory} is {_kind(found)}; name a function or a class that makes the network.")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    made = {node.name.lower(): node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    close = difflib.get_close_matches(factory.lower(), made, n=1)
    defined = ", ".join(made.values()) or "no function and no class"
    hint = f"Did you mean {made[close[0]]}?" if close else f"It defines {defined}."
    raise TrainingError(f"{file} has no {factory}. {hint}")


def _arguments(make: Callable[..., Any], offered: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):
        return {}  # a callable without a signature, such as one of C
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    arguments = {key: value for key, value in offered.items() if key in parameters and parameters[key].kind in named}
    for key, parameter in parameters.items():
        if key not in arguments and parameter.default is parameter.empty and parameter.kind not in optional:
            raise TrainingError(
                f"{name} needs the argument {key!r}; only {', '.join(offered)} are given. Give {key} a default."
            )
    return arguments


def _run(call: Callable[[], Any], file: Path, what: str) -> Any:
    """The call's result. Raises TrainingError for an exception of the user's code, with the line that it came from."""
    try:
        return call()
    except (Exception, SystemExit) as error:
        raise TrainingError(f"{what}: {_describe(error, file)}") from error


def _describe(error: BaseException, file: Path) -> str:
    """Type, message and place: the innermost line of the user's folder, else of anything."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    if isinstance(error, SyntaxError):
        return f"{message.split(' (')[0]} ({error.filename}, line {error.lineno})"
    folder = file.resolve().parent
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if folder in Path(frame.filename).resolve().parents]
    installed = [frame for frame in theirs if "site-packages" not in frame.filename]
    place = (installed or frames)[-1]
    return f"{message} ({place.filename}, line {place.lineno})"


def _count_logits(model: nn.Module, file: Path, name: str, shape: tuple[int, int, int, int], *, fixed: bool) -> int:
    """K of the network's output [N, K], in both modes. fixed: it was made for this image size, and knows no other."""
    images, channels, height, width = shape
    try:
        output = _forward(model.eval(), shape)
    except Exception as error:

        def takes(side: int) -> bool:
            return succeeds(lambda: _forward(model, (images, channels, side, side)))

        side = None if fixed else smallest_side(takes, above=min(height, width))
        hint = "" if side is None else f" Images of {side}x{side} pixels work: set data.image_size to {side}."
        raise TrainingError(
            f"{name} cannot take images [N, {channels}, {height}, {width}]: {_describe(error, file)}.{hint}"
        ) from error
    training = _run(lambda: _forward(model.train(), shape), file, f"{name} fails in training mode")
    for mode, logits in (("", output), (" in training mode", training)):
        if not isinstance(logits, Tensor):
            raise TrainingError(f"{name} gives {_kind(logits)}{mode}; a classifier gives one tensor of logits [N, K].")
        if logits.dim() != 2 or len(logits) != images:
            raise TrainingError(
                f"{name} gives a tensor of shape {list(logits.shape)}{mode} for {images} images; a classifier gives "
                "logits [N, K]."
            )
    return int(output.shape[1])


@torch.no_grad()
def _forward(model: nn.Module, shape: tuple[int, int, int, int]) -> Any:
    """The output for images of zeros; draws no random number of the run's and leaves BatchNorm's statistics alone."""
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers() if not _is_lazy(tensor)}
    with torch.random.fork_rng(devices=[]):
        output = model(torch.zeros(shape))
    for name, tensor in model.named_buffers():
        if name in buffers:
            tensor.copy_(buffers[name])
    return output


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.parameter.UninitializedBuffer)


def _kind(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"
