"""Which exceptions are the user's business, and the one line each becomes. Any other is a bug and keeps its trace.

The rooms' error classes are looked up among the modules already loaded: what was never imported cannot have raised.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import NoReturn

from mecdeploy.errors import UserError

_ROOM_ERRORS = {
    "mecdeploy.training.errors": "TrainingError",
    "mecdeploy.export.errors": "ExportError",
    "mecdeploy.runtime_checks.errors": "CheckError",
}
_NEXT_STEP = {
    errno.ENOSPC: "Free some space, or choose another --out.",
    errno.EDQUOT: "Free some of your quota, or choose another --out.",
    errno.EROFS: "Choose an --out on a file system that can be written.",
    errno.EACCES: "Choose another --out, or get the permission.",
    errno.EPERM: "Choose another --out, or get the permission.",
    errno.ENOENT: "Create the folder first.",
    errno.ENOTDIR: "Part of the path is a file; choose another path.",
    errno.EISDIR: "The path is a folder; name a file in it.",
}

_LOST_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")
_LOST_CLAUSES = ("Connection closed by peer", "Connection reset by peer", "gloo/transport")


def explain(error: BaseException) -> str | None:
    """The line for the user, or None for an error that only a programmer can cause."""
    if isinstance(error, (UserError, *_room_errors())):
        return _one_line(str(error))
    if type(error).__name__ == "OutOfMemoryError":  # torch's, whose module may not be loaded
        return "the GPU has no memory left; lower schedule.batch_size, or use --device cpu."
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return _one_line(f"{where}{error.strerror}. {_NEXT_STEP.get(error.errno or 0, '')}")
    if isinstance(error, OSError):
        return _one_line(str(error))
    return None


def lost_peer(error: BaseException) -> bool:
    """Whether this process has only lost another one of its job, which says itself what stopped it."""
    if type(error).__name__ == "PeerFailed":
        return True
    # What gloo and NCCL raise when a connection breaks; gloo's are plain RuntimeErrors.
    return isinstance(error, RuntimeError) and (
        type(error).__name__ in _LOST_ERRORS or any(clause in str(error) for clause in _LOST_CLAUSES)
    )


def tell_torchrun(error: Exception) -> None:
    """Leave the error where torchrun, if it started this process, looks for what stopped the job.

    What is the user's business goes there as a line, without the stack trace of its own.
    """
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.errors import record

    def fail() -> NoReturn:
        raise error from error.__cause__  # and not from the error that is being handled

    with suppress(type(error)):
        record(fail)()


def _room_errors() -> tuple[type[BaseException], ...]:
    loaded = ((sys.modules.get(module), name) for module, name in _ROOM_ERRORS.items())
    return tuple(getattr(module, name) for module, name in loaded if module is not None)


def _one_line(message: str) -> str:
    return " ".join(message.split())
