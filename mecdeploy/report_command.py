"""`mecdeploy report`: parses, calls the API, prints what comes back."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mecdeploy.terminal import console_on, network_of, say_what_is_executed

CHECK_FAILED = 1
_PATH = click.Path(path_type=Path)


@click.command(short_help="Write one HTML page about a finished run.")
@click.argument("run", type=_PATH)
@click.argument("model", type=_PATH, required=False)
@click.option("--out", type=_PATH, metavar="FILE.html", help="Default: RUN/report.html; JSON goes beside it.")
def report(run: Path, model: Path | None, out: Path | None) -> None:
    """Write one self-contained HTML page about RUN and its exported MODEL (default: RUN/model.onnx)."""
    from mecdeploy import progress
    from mecdeploy.run_report import writing

    say_what_is_executed(network_of(run))
    with progress.checking_progress(console_on(sys.stderr)) as tell:
        written = writing.report(run, model, out=out, progress=tell)
    click.echo(f"{written.page}: {written.page.stat().st_size / 1e6:.2f} MB, opens offline in any browser")
    click.echo(f"The same facts as JSON: {written.data}")
    if not written.passed:
        for failure in written.facts.certificate.failures:
            click.echo(f"Failed: {failure}", err=True)
        raise click.exceptions.Exit(CHECK_FAILED)
