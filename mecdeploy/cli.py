"""The command line. It parses, calls the API, prints what comes back and sets the exit code.

0: done. 1: a check failed. 2: the user's input was refused, in one line on stderr. 3: another process of the same job
stopped, and says why itself. 130: interrupted.
Nothing heavy is imported before a command runs, so that --help answers at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mecdeploy import __version__
from mecdeploy.bench_command import bench
from mecdeploy.compare_command import compare
from mecdeploy.errors import UserError
from mecdeploy.failures import explain, lost_peer, tell_torchrun
from mecdeploy.measure_commands import hessian, representation, sensitivity
from mecdeploy.training.launch import launched

if TYPE_CHECKING:
    from rich.console import Console

    from mecdeploy.config import Settings
    from mecdeploy.training.config import TrainConfig

CHECK_FAILED, REFUSED, PEER_LOST, INTERRUPTED = 1, 2, 3, 130
_BITS = "[1|2|3|4|8]"
_PATH = click.Path(path_type=Path)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mecdeploy")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train a low-bit vision classifier, export it as packed ONNX, prove that onnxruntime computes the same."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command(short_help="Train a run.")
@click.option(
    "--config", "config_file", type=_PATH, metavar="run.toml", help="Settings file; the flags below override it."
)
@click.option(
    "--data",
    "data__name",
    metavar="NAME",
    help="digits, cifar10, cifar100, fashion-mnist, imagefolder:PATH or shards:PATH.",
)
@click.option(
    "--skip-bad-images", "data__skip_bad_images", is_flag=True, default=None, help="Leave out unreadable images."
)
@click.option(
    "--model", "model__name", metavar="NAME", help="resnet8, ..., any torchvision classifier, or FILE.py:FACTORY."
)
@click.option("--weight-bits", "quant__weight_bits", type=int, metavar=_BITS, help="Weights of the inner layers.")
@click.option("--act-bits", "quant__act_bits", type=int, metavar=_BITS, help="Activations of the inner layers.")
@click.option(
    "--method",
    metavar="[mec|lsq|lsq+|pact|dorefa|fp32]",
    help="LSQ with the coding objective, LSQ alone, another baseline, or full precision only.",
)
@click.option(
    "--labels", "data__labels", metavar="[given|none]", help="none: images alone; the full-precision --weights teach."
)
@click.option("--distill", "distill__weight", type=float, metavar="WEIGHT", help="Of what the full precision teaches.")
@click.option("--epochs", "schedule__epochs", type=int, help="Epochs of quantisation-aware training.")
@click.option("--fp-epochs", "schedule__fp_epochs", type=int, help="Epochs of full-precision training before it.")
@click.option(
    "--weights", metavar="NAME|FILE", help="Start from these: torchvision's (DEFAULT, ...), a checkpoint, a state dict."
)
@click.option("--device", metavar="[auto|cpu|cuda]", help="Where to train.")
@click.option("--compile", "schedule__compile", is_flag=True, default=None, help="Faster steps, through torch.compile.")
@click.option("--seed", type=int, help="Fixes every random choice; a CPU run repeats bit for bit.")
@click.option("--out", type=_PATH, metavar="RUN", help="Folder of the run. Default: runs/<data>-<model>-<method>-...")
@click.option("--resume", is_flag=True, help="Continue the run in --out.")
def train(config_file: Path | None, out: Path | None, resume: bool, **flags: Any) -> None:
    """Train a run: full precision, calibration, quantisation-aware training, a final phase with deployed arithmetic."""
    from mecdeploy.training.world import joined

    with joined() as world:  # one process, or those that torchrun started
        config, folder, resume = world.from_main(
            lambda: _resolve(config_file, out, resume, _settings(flags), restarted=world.launch.restarts > 0)
        )
        if not world.main:
            _train_silently(config, folder, resume)
            return
        say_what_is_executed(config.model.name)
        from mecdeploy import api, progress, tables

        with _interruptible(folder), progress.training_progress(console_on(sys.stderr)) as report:
            result = api.train(config, folder, resume=resume, report=report)
    console_on(sys.stdout).print(tables.training(result, config.method))
    if config.method != "fp32":
        click.echo(f"Next: mecdeploy export {folder}")


@cli.command(short_help="Write a finished run as one ONNX file.")
@click.argument("run", type=_PATH)
@click.option("--bits", type=int, metavar=_BITS, help="Pack low-bit weights at this width. Default: as trained.")
@click.option("--out", type=_PATH, metavar="FILE", help="Default: RUN/model.onnx.")
@click.option(
    "--target", default="onnxruntime", show_default=True, metavar="[onnxruntime|portable]", help="Who reads it."
)
@click.option(
    "--input", default="uint8", show_default=True, metavar="[uint8|float]", help="Raw pixels, or pixels / 255."
)
def export(run: Path, bits: int | None, out: Path | None, target: str, input: str) -> None:
    """Write the finished RUN as one ONNX file with packed low-bit weights."""
    from mecdeploy import api, tables

    say_what_is_executed(network_of(run))
    report = api.export(run, out=out, bits=bits, target=target, input=input)
    console_on(sys.stdout).print(tables.export(report))
    click.echo(f"Next: mecdeploy check {run}" + ("" if out is None else f" {out}"))


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
    with _interruptible(out):
        result = run_demo(
            out, progress=lambda: progress.training_progress(errors), say=lambda line: click.echo(line, err=True)
        )
    console_on(sys.stdout).print(tables.demo(result))
    if not result.parity.passed:
        for failure in result.parity.failures:
            click.echo(f"Failed: {failure}", err=True)
        raise click.exceptions.Exit(CHECK_FAILED)


cli.add_command(bench)
cli.add_command(compare)
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


@contextmanager
def _interruptible(out: Path | None) -> Iterator[None]:
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


def _refuse(message: str) -> int:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    return REFUSED


def _settings(flags: dict[str, Any]) -> Settings:
    """Flags as nested settings: data__name is data.name; flags not given are absent."""
    settings: Settings = {}
    for name, value in flags.items():
        if value is not None:
            *sections, key = name.split("__")
            section = settings
            for part in sections:
                section = section.setdefault(part, {})
            section[key] = value
    return settings


def _train_silently(config: TrainConfig, out: Path, resume: bool) -> None:
    """Take part in training; what there is to say and to write is process 0's business."""
    from mecdeploy import api
    from mecdeploy.training.events import TrainingInterrupted

    try:
        api.train(config, out, resume=resume)
    except TrainingInterrupted:
        raise click.exceptions.Exit(INTERRUPTED) from None


def _resolve(
    config_file: Path | None, out: Path | None, resume: bool, flags: Settings, *, restarted: bool
) -> tuple[TrainConfig, Path, bool]:
    """The run's config and folder, and whether to go on with it: the file (on --resume the run's own), then the flags.

    restarted: by torchrun, after a process failed: the same command line then resumes, if there is something to resume.
    """
    from mecdeploy import config as configs
    from mecdeploy.run_folder import CONFIG, require_run

    if resume:
        if out is None:
            raise UserError("--resume needs --out RUN, the folder of the run to continue.")
        if config_file is not None:
            raise UserError("--resume continues with RUN/run.toml; leave out --config.")
        config_file = require_run(out).path / CONFIG
    settings = configs.read_settings(config_file) if config_file is not None else {}
    config = configs.resolve(configs.merge(settings, flags), source=str(config_file or ""))
    out = out if out is not None else Path("runs") / configs.run_name(config)
    return config, out, resume or (restarted and (out / CONFIG).is_file())


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


if __name__ == "__main__":
    main()
