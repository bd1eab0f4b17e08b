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

OTHER_BATCH = 5
"""Images on which a model that fixed its batch size while it was traced is shown to fail."""

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
        # Without gradients, since a no_grad() in the user's code would else become an operator around others.
        with _quiet(), torch.no_grad():
            program = torch.export.export(model, (image,), dynamic_shapes=({0: batch},), strict=False)
    except TrainingError:
        raise
    except Exception as error:
        raise TrainingError(_explain(model, image, error)) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    for node in program.graph_module.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise TrainingError(
                f"{type(model).__name__} cannot be traced: {node.target} runs operators of its own, which are "
                "not looked into. Take it out of the model's forward (torch.autocast too: training sets its own)."
            )
    return program


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


def _explain(model: nn.Module, image: Tensor, error: Exception) -> str:
    kind = type(model).__name__
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    names = type(error).__name__ + str(error)
    if "DataDependent" in names or "data-dependent" in names:
        return (
            f"{kind} cannot be traced{_place(error)}: the line looks at values of tensors, which are not known before "
            "it runs. Rewrite it without a branch or a number taken from a tensor (torch.where keeps both sides)."
        )
    if "Constraint" in names or "specialized" in names.lower():
        others = image.new_zeros(OTHER_BATCH, *image.shape[1:])
        return (
            f"{kind} cannot be traced{_place_of_failure(model, others)}: its forward fixes the batch size. Take it "
            "from the input (x.shape[0], or -1 in a reshape), so that any number of images can be served."
        )
    if "in output, which is not a known type" in names:
        return f"{kind} cannot be traced: {reason.split(',')[0]}. Return the logits as a tensor, or in a tuple or dict."
    return (
        f"{kind} cannot be traced{_place_of_failure(model, image) or _place(error)}: {type(error).__name__}: "
        f"{reason.rstrip('.')[:300]}. It is given float32 images [N, {', '.join(str(n) for n in image.shape[1:])}]."
    )


def _place(error: BaseException) -> str:
    """The last line of the user's code in the traceback of an error or of its causes; empty where there is none."""
    cause: BaseException | None = error
    while cause is not None:
        frames = [f for f in traceback.extract_tb(cause.__traceback__) if not is_not_the_users(f.filename)]
        if frames:
            return f" at {frames[-1].filename}:{frames[-1].lineno} (`{frames[-1].line}`)"
        cause = cause.__cause__ or cause.__context__
    return ""


def _place_of_failure(model: nn.Module, images: Tensor) -> str:
    """Where the model fails on images without being traced: the module and the line; empty where it does not."""
    entered: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda _, __, name=name: entered.append(name)))
        hooks.append(module.register_forward_hook(lambda _, __, ___: entered.pop() and None))
    try:
        with _quiet(), torch.no_grad():
            model(images)
    except Exception as error:
        inside = f" in {entered[-1]}" if entered and entered[-1] else ""
        return inside + _place(error)
    finally:
        for hook in hooks:
            hook.remove()
    return ""


def is_not_the_users(filename: str) -> bool:
    """Whether a file is torch's, Python's own, or this one."""
    standard = filename.startswith(_STANDARD_LIBRARY) and "site-packages" not in filename
    return standard or filename == __file__ or "/torch/" in f"/{filename}" or filename.startswith("<")
