"""`mecdeploy compare`: parses, calls the API, prints what comes back."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mecdeploy.study.running import RunEvent

FAILED, INTERRUPTED = 1, 130
_PATH = click.Path(path_type=Path)


@click.command(short_help="Compare methods over bits and seeds.")
@click.option("--config", type=_PATH, metavar="study.toml", required=True, help="What is compared with what.")
@click.option(
    "--out", type=_PATH, metavar="DIR", help="Folder of the study, continued if it exists. Default: studies/<config>."
)
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Runs at once. Default: study.jobs.")
@click.option("--dry-run", is_flag=True, help="Say what would be run, and run nothing.")
def compare(config: Path, out: Path | None, jobs: int | None, dry_run: bool) -> None:
    """Run every method with every width and seed of a study, resume what was stopped, and compare seed by seed."""
    from rich.console import Console

    from mecdeploy.study import compare as study
    from mecdeploy.study import tables
    from mecdeploy.terminal import say_what_is_executed

    out = out if out is not None else study.default_out(config)
    output = Console(file=sys.stdout)
    _, cells = study.open_study(config, out)
    if dry_run:
        images = study.training_images(cells)
        output.print(tables.planned(cells, images))
        shown = sum(cell.epochs * (count or 0) for cell, count in zip(cells, images, strict=True))
        least = "at least " if None in images else ""
        click.echo(f"{len(cells)} runs, {sum(cell.epochs for cell in cells)} epochs, {least}{shown:,} images")
        return
    for model in dict.fromkeys(cell.config.model.name for cell in cells):
        say_what_is_executed(model)
    began = time.monotonic()
    try:
        report = study.compare(config, out, jobs=jobs, report=lambda event: _say(event, began))
    except KeyboardInterrupt:
        click.echo(
            f"Interrupted; every run is saved. Continue with: mecdeploy compare --config {config} --out {out}", err=True
        )
        raise click.exceptions.Exit(INTERRUPTED) from None
    output.print(tables.results(report))
    output.print(tables.explanation(report), highlight=False)
    if report.measured:
        output.print(tables.measures(report))
    for note in report.notes:
        click.echo(note, err=True)
    if report.untested:
        click.echo(
            f"Not tested, since the test images were read before they ran: {', '.join(report.untested)}.", err=True
        )
    for name, reason in report.failures.items():
        click.echo(f"Failed: {name}: {reason}", err=True)
    if report.failures:
        click.echo(f"Logs: {out / 'logs'}. The same command tries them again.", err=True)
        raise click.exceptions.Exit(FAILED)


def _say(event: RunEvent, began: float) -> None:
    """One line: 03:12 7/27 mec-w2a4-seed1 finished, ETA 0:41:10."""
    from mecdeploy.progress import duration

    line = f"{duration(time.monotonic() - began)}  {event.done}/{event.total}  {event.cell.name} {event.what}"
    if event.accuracy is not None:
        line += f", accuracy {event.accuracy:.2%}"
    if event.message:
        line += f": {event.message}"
    if event.seconds_left is not None:
        line += f"  ETA {duration(event.seconds_left)}"
    click.echo(line, err=True)
