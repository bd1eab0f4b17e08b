"""What each layer of a finished run loses at fewer bits, and the settings of a run with widths that fit a size.

Writes both into the run folder; nothing here prints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mecdeploy import run_folder
from mecdeploy.config import to_toml
from mecdeploy.errors import UserError

if TYPE_CHECKING:
    from mecdeploy.training.sensitivity import Study


@dataclass(frozen=True, kw_only=True)
class SensitivityReport:
    """What a sensitivity study wrote: settings for a run with the proposed widths, and everything measured."""

    settings: Path
    measurements: Path
    study: Study


def sensitivity(
    run: str | Path,
    *,
    size: str | int | None = None,
    images: int = 1024,
    activations: bool = False,
    out: str | Path | None = None,
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> SensitivityReport:
    """Measure what each layer loses at fewer weight bits and propose widths for a size (docs/mixed-precision.md).

    run: the folder of a finished run of any method. size: of all packed weights: bytes, "1.2MB", or "70%" of their size
    at 8 bits; None for that of the run's own widths. images: training images to measure on.
    activations: measure these, too. out: by default RUN/sensitivity.toml; RUN/sensitivity.json holds what was measured.
    progress: called with (what, done, total). Raises UserError for a folder that is no run, TrainingError for a run
    that has not finished or a size that no widths fit, OSError for a place that cannot be written.
    """
    folder = run_folder.require_run(Path(run))
    settings = Path(out) if out is not None else folder.path / "sensitivity.toml"
    if settings.resolve() == (folder.path / run_folder.CONFIG).resolve():
        raise UserError(f"{settings} holds the run's own settings; choose another --out.")
    if not settings.parent.is_dir():  # before minutes of measuring, not after
        raise UserError(f"{settings.parent} is no folder; create it first, or choose another --out.")
    config = folder.read_config()
    if config.data.labels == "none":
        raise UserError(
            f"{folder.path} was trained without labels (data.labels is none), and sensitivity measures the cross "
            "entropy of training images; study a run on labelled images instead."
        )
    from mecdeploy.training.bit_allocation import with_weight_bits
    from mecdeploy.training.checkpoint import file_sha256
    from mecdeploy.training.data import load_dataset
    from mecdeploy.training.device import choose_device
    from mecdeploy.training.sensitivity import load_float_network, study

    target = choose_device(dataclasses.replace(config, device=device).device)
    network, spec, checkpoint = load_float_network(folder.path, config)
    found = study(
        network,
        spec,
        load_dataset(config.data, seed=config.seed).train,
        config,
        size=None if size is None else str(size),
        images=images,
        activations=activations,
        device=target,
        progress=progress or (lambda what, done, total: None),
    )
    measurements = folder.path / "sensitivity.json"
    record = {"checkpoint_sha256": file_sha256(checkpoint), **found.to_json()}
    run_folder.write_json(measurements, record)
    proposed = with_weight_bits(config, found.bits, checkpoint.resolve())
    run_folder.write_atomically(settings, to_toml(proposed).encode())
    return SensitivityReport(settings=settings, measurements=measurements, study=found)
