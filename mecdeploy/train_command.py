"""`mecdeploy train`: flags and a settings file become a config, and a folder to train it in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mecdeploy.errors import UserError
from mecdeploy.terminal import INTERRUPTED, console_on, interruptible, say_what_is_executed

if TYPE_CHECKING:
    from mecdeploy.config import Settings
    from mecdeploy.training.config import TrainConfig

BITS = "[1|2|3|4|8]"
_PATH = click.Path(path_type=Path)


@click.command(short_help="Train a run.")
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
@click.option("--weight-bits", "quant__weight_bits", type=int, metavar=BITS, help="Weights of the inner layers.")
@click.option("--act-bits", "quant__act_bits", type=int, metavar=BITS, help="Activations of the inner layers.")
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
@click.option("--tensorboard", is_flag=True, help="Write event files for TensorBoard, too.")
def train(config_file: Path | None, out: Path | None, resume: bool, tensorboard: bool, **flags: Any) -> None:
    """Train a run: full precision, calibration, quantisation-aware training, a final phase with deployed arithmetic."""
    from mecdeploy.training.world import joined

    with joined() as world:  # one process, or those that torchrun started
        config, folder, resume = world.from_main(
            lambda: _resolve(config_file, out, resume, _settings(flags), restarted=world.launch.restarts > 0)
        )
        if not world.main:
            _train_silently(config, folder, resume, tensorboard)
            return
        say_what_is_executed(config.model.name)
        from mecdeploy import api, progress, tables

        with interruptible(folder), progress.training_progress(console_on(sys.stderr)) as report:
            result = api.train(config, folder, resume=resume, report=report, tensorboard=tensorboard)
    console_on(sys.stdout).print(tables.training(result, config.method))
    if config.method != "fp32":
        click.echo(f"Next: mecdeploy export {folder}")


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


def _train_silently(config: TrainConfig, out: Path, resume: bool, tensorboard: bool) -> None:
    """Take part in training; what there is to say and to write is process 0's business."""
    from mecdeploy import api
    from mecdeploy.training.events import TrainingInterrupted

    try:
        api.train(config, out, resume=resume, tensorboard=tensorboard)
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
