"""`mecdeploy bench`: parses, calls the API, prints what comes back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)


@click.command(short_help="Time a model in onnxruntime, beside others.")
@click.argument("model", type=_PATH)
@click.option(
    "--against",
    multiple=True,
    metavar="[FILE|RUN|fp32|int8]",
    help="Another ONNX file; a run's full-precision network; fp32 or int8: that of MODEL's own run. Repeatable.",
)
@click.option("--run", type=_PATH, metavar="RUN", help="MODEL's own run. Default: the folder of MODEL.")
@click.option("--threads", type=_COUNT, multiple=True, metavar="N", help="Repeatable. Default: 1.")
@click.option(
    "--batch", type=_COUNT, multiple=True, metavar="N", help="Images a call. Repeatable. Default: as fixed, or 1."
)
@click.option(
    "--shape", multiple=True, metavar="NAME=AxBxC", help="Axes after the batch, where the file leaves them open."
)
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=10.0, show_default=True, help="Of timing, for all together."
)
@click.option("--rounds", type=_COUNT, default=20, show_default=True, help="At least so many, however long they take.")
@click.option("--loads", type=_COUNT, default=3, show_default=True, help="Processes that measure load and memory.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws the pixels.")
@click.option("--profile", is_flag=True, help="Show where the time goes, kernel by kernel.")
@click.option("--json", "as_json", is_flag=True, help="Print everything measured as JSON, and no table.")
def bench(
    model: Path,
    against: Sequence[str],
    run: Path | None,
    threads: Sequence[int],
    batch: Sequence[int],
    shape: Sequence[str],
    seconds: float,
    rounds: int,
    loads: int,
    seed: int,
    profile: bool,
    as_json: bool,
) -> None:
    """Measure load time, memory, latency and throughput of MODEL, an ONNX file, in onnxruntime on this CPU."""
    import json

    from mecdeploy import bench_tables
    from mecdeploy.benchmark import bench as measure
    from mecdeploy.runtime_checks import parse_shape
    from mecdeploy.terminal import console_on

    report = measure(
        model,
        against=against,
        run=run,
        threads=threads or (1,),
        batches=batch,
        seconds=seconds,
        rounds=rounds,
        loads=loads,
        shapes=dict(map(parse_shape, shape)),
        seed=seed,
        profile=profile,
        say=lambda line: click.echo(line, err=True),
    )
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        console = console_on(sys.stdout)
        for table in bench_tables.timings(report):
            console.print(table, "")
        for row in report.rows if profile else ():
            console.print(bench_tables.kernels(row), "")
        click.echo(bench_tables.machine(report))
    for warning in report.warnings:
        click.echo(f"Warning: {warning}", err=True)
