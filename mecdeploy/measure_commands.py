"""The commands that measure a finished run; `cli` adds them to its own."""

from __future__ import annotations

import sys
from pathlib import Path

import click

_PATH = click.Path(path_type=Path)
_DEVICE = click.option(
    "--device", default="auto", show_default=True, metavar="[auto|cpu|cuda]", help="Where to measure."
)


@click.command(short_help="Measure which layers need their bits; propose widths for a size.")
@click.argument("run", type=_PATH)
@click.option(
    "--size", metavar="SIZE", help="Of the packed weights: 40000, 1.2MB, 70% of 8 bits. Default: the run's own."
)
@click.option("--images", type=click.IntRange(min=2), default=1024, show_default=True, help="How many to measure on.")
@click.option("--activations", is_flag=True, help="Measure the activations, too.")
@_DEVICE
@click.option("--out", type=_PATH, metavar="FILE.toml", help="Settings with the widths. Default: RUN/sensitivity.toml.")
def sensitivity(run: Path, size: str | None, images: int, activations: bool, device: str, out: Path | None) -> None:
    """Measure what each layer of RUN loses at fewer bits, and propose weight bits per layer for a size."""
    from mecdeploy import progress, sensitivity_study, tables
    from mecdeploy.terminal import console_on, network_of, say_what_is_executed

    say_what_is_executed(network_of(run))
    with progress.checking_progress(console_on(sys.stderr)) as report_progress:
        report = sensitivity_study.sensitivity(
            run, size=size, images=images, activations=activations, out=out, device=device, progress=report_progress
        )
    further = [tables.activation_sensitivity(report.study)] if report.study.activations else []
    for table in (tables.sensitivity(report.study), *further, tables.mixed_precision(report.study)):
        console_on(sys.stdout).print(table, "")
    click.echo(f"Everything measured: {report.measurements}")
    click.echo(f"Next: mecdeploy train --config {report.settings} --out {run}-mixed")


@click.command(short_help="Measure how a run uses its codes and spreads its features.")
@click.argument("run", type=_PATH)
@click.option("--images", type=click.IntRange(min=2), help="How many to measure on. Default: 1024, or all if fewer.")
@click.option(
    "--part", default="validation", show_default=True, metavar="[validation|training]", help="Which images of the data."
)
@_DEVICE
def representation(run: Path, images: int | None, part: str, device: str) -> None:
    """Measure how the finished RUN uses its codes (entropy, levels, ends) and spreads its features (rank, classes)."""
    from mecdeploy import measure_tables, measures, progress
    from mecdeploy.terminal import console_on, network_of, say_what_is_executed

    say_what_is_executed(network_of(run))
    with progress.checking_progress(console_on(sys.stderr)) as tell:
        report = measures.representation(run, images=images, part=part, device=device, progress=tell)
    console = console_on(sys.stdout)
    for kind, uses in (("output", report.activations), ("weights of", report.weights)):
        if uses:
            console.print(measure_tables.codes(kind, uses), "")
    console.print(measure_tables.features(report), "")
    click.echo(f"Everything measured: {run / measures.REPRESENTATION}")


@click.command(short_help="Measure how sharp the minimum of a run is.")
@click.argument("run", type=_PATH)
@click.option("--images", type=click.IntRange(min=2), help="Training images. Default: 512, or all if fewer.")
@click.option("--probes", type=click.IntRange(min=2), default=32, show_default=True, help="Random signs for the trace.")
@click.option(
    "--iterations", type=click.IntRange(min=1), default=100, show_default=True, help="At most, for an eigenvalue."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws images and probes.")
@_DEVICE
def hessian(run: Path, images: int | None, probes: int, iterations: int, seed: int, device: str) -> None:
    """Measure the top eigenvalue and the trace of the loss's Hessian in the weights of the finished RUN."""
    from mecdeploy import measure_tables, measures, progress
    from mecdeploy.terminal import console_on, network_of, say_what_is_executed

    say_what_is_executed(network_of(run))
    with progress.checking_progress(console_on(sys.stderr)) as tell:
        report = measures.hessian(
            run, images=images, probes=probes, iterations=iterations, seed=seed, device=device, progress=tell
        )
    console_on(sys.stdout).print(measure_tables.hessian(report), "")
    click.echo(f"Everything measured: {run / measures.HESSIAN}")
