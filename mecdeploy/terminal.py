"""What every command says in the same way: tables, what a run executes, and how to go on after Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mecdeploy.training.launch import launched

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130


def network_of(run: Path) -> str:
    """model.name in the run's own run.toml; empty where there is no run."""
    from mecdeploy.run_folder import CONFIG, RunFolder

    return RunFolder(run).read_config().model.name if (run / CONFIG).is_file() else ""


def say_what_is_executed(model: str) -> None:
    """Name the file of the user's that this command runs, where the network comes from one."""
    from mecdeploy.training.names import user_file

    named = user_file(model)
    if named is not None and named[0].is_file():
        click.echo(f"Executing {named[0].absolute()} (model.name is {model})", err=True)


def console_on(stream: Any) -> Console:
    """Where tables and progress go: rich's console on a stream."""
    from rich.console import Console

    return Console(file=stream)


@contextmanager
def interruptible(out: Path | None) -> Iterator[None]:
    """After Ctrl-C, say what was saved and how to go on. out: None for a run that nobody keeps."""
    from mecdeploy.training.events import TrainingInterrupted

    try:
        yield
    except TrainingInterrupted as interruption:
        if out is None:
            raise KeyboardInterrupt from None
        command = "mecdeploy train" if launched().size == 1 else "torchrun ... -m mecdeploy train"
        hint = f" Continue with: {command} --resume --out {out}" if interruption.path is not None else ""
        click.echo(f"{interruption}{hint}", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
