"""The command line. It parses, calls the API, prints what comes back and sets the exit code.

0: done. 1: a check failed. 2: the user's input was refused, in one line on stderr. 3: another process of the same job
stopped, and says why itself. 130: interrupted.
Nothing heavy is imported before a command runs, so that --help answers at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

from mecdeploy import __version__
from mecdeploy.bench_command import bench
from mecdeploy.compare_command import compare
from mecdeploy.errors import UserError
from mecdeploy.failures import explain, lost_peer, tell_torchrun
from mecdeploy.inspect_command import inspect
from mecdeploy.measure_commands import hessian, representation, sensitivity
from mecdeploy.report_command import report
from mecdeploy.serve_command import serve
from mecdeploy.terminal import INTERRUPTED, console_on, interruptible, network_of, say_what_is_executed
from mecdeploy.train_command import BITS, train
from mecdeploy.training.launch import launched

CHECK_FAILED, REFUSED, PEER_LOST = 1, 2, 3
_PATH = click.Path(path_type=Path)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mecdeploy")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train a low-bit vision classifier, export it as packed ONNX, prove that onnxruntime computes the same."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command(short_help="Write a finished run as one ONNX file.")
@click.argument("run", type=_PATH)
@click.option("--bits", type=int, metavar=BITS, help="Pack low-bit weights at this width. Default: as trained.")
@click.option("--out", type=_PATH, metavar="PATH", help="File, or repository. Default: RUN/model.onnx, RUN/triton.")
@click.option(
    "--layout", default="file", show_default=True, metavar="[file|triton]", help="One file, or a Triton repository."
)
@click.option("--name", help="Of the model in the repository. Default: the name of the run's folder.")
@click.option(
    "--target", default="onnxruntime", show_default=True, metavar="[onnxruntime|portable]", help="Who reads it."
)
@click.option(
    "--input", default="uint8", show_default=True, metavar="[uint8|float]", help="Raw pixels, or pixels / 255."
)
def export(
    run: Path, bits: int | None, out: Path | None, layout: str, name: str | None, target: str, input: str
) -> None:
    """Write the finished RUN as one ONNX file with packed low-bit weights."""
    from mecdeploy import api, tables

    say_what_is_executed(network_of(run))
    report = api.export(run, out=out, bits=bits, target=target, input=input, layout=layout, name=name)
    console_on(sys.stdout).print(tables.export(report))
    click.echo(f"Next: mecdeploy check {run}" + ("" if report.path == run / "model.onnx" else f" {report.path}"))
    if layout == "triton":
        click.echo(f"Then: tritonserver --model-repository={report.path.parents[2].absolute()}")


@cli.command(short_help="Prove that the file computes what was trained.")
@click.argument("run", type=_PATH)
@click.argument("model", type=_PATH, required=False)
def check(run: Path, model: Path | None) -> None:
    """Prove that onnxruntime computes from MODEL (default: RUN/model.onnx) the integers that RUN trained."""
    from mecdeploy import api, progress, tables

    say_what_is_executed(network_of(run))
    with progress.checking_progress(console_on(sys.stderr)) as report_progress:
        report = api.check(run, model, progress=report_progress)
    console_on(sys.stdout).print(tables.parity(report))
    if not report.passed:
        for failure in report.failures:
            click.echo(f"Failed: {failure}", err=True)
        raise click.exceptions.Exit(CHECK_FAILED)


@cli.command(short_help="Classify image files.")
@click.argument("model", type=_PATH)
@click.argument("images", type=_PATH, nargs=-1, required=True)
@click.option("--top", type=click.IntRange(min=1), default=3, show_default=True, help="How many classes to show.")
def predict(model: Path, images: Sequence[Path], top: int) -> None:
    """Classify image files with an exported MODEL, in onnxruntime alone."""
    from mecdeploy.prediction import Predictor

    predictor = Predictor(model)
    refused = False
    for image in images:
        try:
            best = predictor.predict(image).top(top)
        except UserError as error:
            refused = bool(_refuse(str(error)))  # one bad file does not keep the others from their answer
            continue
        click.echo(f"{image}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in best))
    if refused:
        raise click.exceptions.Exit(REFUSED)


@cli.command(short_help="All of it on handwritten digits, in about a minute.")
@click.option(
    "--out", type=_PATH, metavar="RUN", help="Keep the run in this folder. Default: a temporary one, removed."
)
def demo(out: Path | None) -> None:
    """Run everything on handwritten digits in about a minute: train, quantise to W4A4, export, check, compare."""
    from mecdeploy import progress, tables
    from mecdeploy.demo import run_demo

    errors = console_on(sys.stderr)
    with interruptible(out):
        result = run_demo(
            out, progress=lambda: progress.training_progress(errors), say=lambda line: click.echo(line, err=True)
        )
    console_on(sys.stdout).print(tables.demo(result))
    if not result.parity.passed:
        for failure in result.parity.failures:
            click.echo(f"Failed: {failure}", err=True)
        raise click.exceptions.Exit(CHECK_FAILED)


cli.add_command(bench)
cli.add_command(train)
cli.add_command(compare)
cli.add_command(serve)
cli.add_command(inspect)
cli.add_command(report)
cli.add_command(sensitivity)
cli.add_command(representation)
cli.add_command(hessian)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and leave the process with its exit code."""
    try:
        code = cli.main(arguments, prog_name="mecdeploy", standalone_mode=False)
    except click.ClickException as error:
        sys.exit(_refuse(error.format_message()))
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted.", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at exit
        sys.exit(CHECK_FAILED)
    except Exception as error:
        if lost_peer(error):
            _leave_behind(launched().rank)
        message = explain(error)
        tell_torchrun(error if message is None else UserError(message))
        if message is None:
            raise
        sys.exit(_refuse(message))
    sys.exit(code if isinstance(code, int) else 0)


def _leave_behind(rank: int) -> NoReturn:
    """Leave because another process of the job stopped, and after it: torchrun blames the first that it sees end."""
    click.echo(f"Process {rank} stops: another process of this run has stopped.", err=True)
    time.sleep(1)  # torchrun looks every tenth of a second, and then ends this process itself
    sys.exit(PEER_LOST)


def _refuse(message: str) -> int:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    return REFUSED


if __name__ == "__main__":
    main()
