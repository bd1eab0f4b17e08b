"""Work that other processes do, in the order that it was asked for."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mecdeploy.training.errors import TrainingError


def in_workers(work: Dataset[Any], requests: Iterable[Any], workers: int) -> Generator[Any, None, None]:
    """work[request] for every request in order, made by worker processes; 0 makes them here.

    A TrainingError that `work` returns is raised here: raised there, the loader would put its traceback into the text.
    TrainingError if a worker dies. Closing the generator ends the workers.
    """
    loader = DataLoader(
        work,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        collate_fn=_as_it_is,
        # Its own generator: the loader would otherwise draw from torch's global one, once an epoch.
        generator=torch.Generator(),
    )
    made = iter(loader)
    try:
        while (result := _next(made, workers)) is not _END:
            if isinstance(result, TrainingError):
                raise result
            yield result
    finally:
        del made  # ends its workers; they would else outlive an exception that holds this frame


_END = object()


def _next(made: Iterator[Any], workers: int) -> Any:
    try:
        return next(made, _END)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):  # it did not die, it raised
            raise
        raise TrainingError(
            f"a process that decodes images ended ({str(error).splitlines()[0]}). It may have run out of memory: "
            f"data.workers is {workers}; set it lower, or to 0."
        ) from error.with_traceback(None)  # which would keep the loader and its processes


def _as_it_is(pixels: Any) -> Any:
    """Leave numpy arrays alone: they come through a pipe, so that a container's small /dev/shm is no limit."""
    return pixels
