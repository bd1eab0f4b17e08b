"""The command line as a process: `python -m mecdeploy`, and the `mecdeploy` script."""

import os
import sys
from contextlib import suppress

from mecdeploy.cli import main


def run() -> None:
    """Run a command, and end this process with its exit code."""
    try:
        main()
    except SystemExit as left:
        _end_at_once(left.code)
        raise


def _end_at_once(code: object) -> None:
    """End a process that was one of several without taking the interpreter down first.

    A thread of gloo's that just then frees the last tensor of a finished exchange would abort the process: it waits for
    the interpreter, which is gone.
    """
    distributed = sys.modules.get("mecdeploy.training.distributed")
    if distributed is not None and distributed.has_joined():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    run()
