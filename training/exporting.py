"""torch.export, kept quiet, with errors that point into the user's code."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sysconfig
import traceback
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mecdeploy.training.errors import TrainingError

_STANDARD_LIBRARY = sysconfig.get_path("stdlib")


def require_one_input(model: nn.Module) -> None:
    """Raise TrainingError where forward needs more than the image."""
    parameters = inspect.signature(model.forward).parameters.values()
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) > 1:
        raise TrainingError(
            f"{type(model).__name__} has {len(required)} inputs ({', '.join(required)}); a classifier takes one image "
            "tensor. Give the others default values, or wrap the model in a module that supplies them."
        )


def export_graph(model: nn.Module, image: Tensor) -> torch.export.ExportedProgram:
    """The graph of a model with a free batch size. Raises TrainingError that names the user's line."""
    batch = torch.export.Dim("batch")
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole block, which hides its layers
        with _quiet():
            return torch.export.export(model, (image,), dynamic_shapes=({0: batch},), strict=False)
    except TrainingError:
        raise
    except Exception as error:
        raise TrainingError(_explain(model, error)) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export from printing what the error is going to say, and from warning about its own workings."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(before)


def _explain(model: nn.Module, error: Exception) -> str:
    kind = type(model).__name__
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    cause: BaseException | None = error
    frames: list[traceback.FrameSummary] = []
    while cause is not None and not frames:
        frames = [f for f in traceback.extract_tb(cause.__traceback__) if not is_not_the_users(f.filename)]
        cause = cause.__cause__ or cause.__context__
    place = f" at {frames[-1].filename}:{frames[-1].lineno} (`{frames[-1].line}`)" if frames else ""
    names = type(error).__name__ + str(error)
    if "DataDependent" in names or "data-dependent" in names:
        return (
            f"{kind} cannot be traced{place}: the line looks at values of tensors, which are not known before it runs. "
            "Rewrite it without a branch or a number taken from a tensor (torch.where keeps both sides)."
        )
    if "Constraint" in names or "specialized" in names.lower():
        return (
            f"{kind} cannot be traced{place}: its forward fixes the batch size. Take it from the input "
            f"(x.shape[0], or -1 in a reshape), so that any number of images can be served. ({reason[:200]})"
        )
    return f"{kind} cannot be traced{place}: {type(error).__name__}: {reason[:300]}"


def is_not_the_users(filename: str) -> bool:
    """Whether a file is torch's, Python's own, or this one."""
    standard = filename.startswith(_STANDARD_LIBRARY) and "site-packages" not in filename
    return standard or filename == __file__ or "/torch/" in f"/{filename}" or filename.startswith("<")
