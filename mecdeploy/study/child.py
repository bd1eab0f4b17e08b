"""What a process of a study executes. It does not outlive the study unseen, and leaves a note of where it ran.

    python -m mecdeploy.study.child PARENT NOTE train --config FILE --out RUN

does what `python -m mecdeploy train --config FILE --out RUN` does; `... NOTE test STUDY` reads the test images of a
study's runs, and `... NOTE measure STUDY KINDS` measures them, KINDS being study.measures as JSON.
PARENT: process id of the study. When that ends, killed or not, this process gets SIGTERM, and so saves
after its step (on Linux). NOTE: a file that gets versions and machine, as JSON, at the end.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from mecdeploy import __version__
from mecdeploy.run_folder import write_json

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run(arguments: list[str]) -> None:
    """Execute the command, tied to its parent; leaves the process with the command's exit code."""
    parent, note, *command = arguments
    _end_with(int(parent))
    # A study that was started in the background may have been told to ignore it; here it comes from the study alone.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from mecdeploy.cli import cli, main

    for further in commands():
        cli.add_command(further)
    try:
        main(command)
    finally:
        if "torch" in sys.modules:
            write_json(Path(note), environment())


def environment() -> dict[str, Any]:
    """Versions and machine of this process: enough to compare two results, nothing that names an owner."""
    import torch
    import torchvision

    from mecdeploy.runtime_checks.machine import describe_cpu, versions

    gpu = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "cpu": describe_cpu().model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "versions": {
            "mecdeploy": __version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            **versions(),
        },
    }


def commands() -> list[Any]:
    """The commands that only a study calls, beside those of the command line."""
    import click

    study = click.argument("study", type=click.Path(path_type=Path))

    @click.command()
    @study
    def test(study: Path) -> None:
        from mecdeploy.study.testing import write_test_accuracies

        write_test_accuracies(study)

    @click.command()
    @study
    @click.argument("kinds")
    def measure(study: Path, kinds: str) -> None:
        from mecdeploy.study.measuring import write_measures

        write_measures(study, json.loads(kinds))

    return [test, measure]


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before this process asked to be told
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    run(sys.argv[1:])
