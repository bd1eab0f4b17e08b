"""The test images: read once, when every run is done, and never for a choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mecdeploy.errors import UserError
from mecdeploy.run_folder import RunFolder, write_json_lines
from mecdeploy.study.plan import RUNS, Cell
from mecdeploy.study.results import AXES, RESULTS, read_records
from mecdeploy.training.config import TrainConfig

if TYPE_CHECKING:
    from mecdeploy.training.config import DataConfig
    from mecdeploy.training.data import ImageDataset, ImageSource

TEST = "test.jsonl"


def dataset_of(config: TrainConfig) -> ImageDataset:
    """The images of a run; without labels, its classes are those of its teacher."""
    from mecdeploy.training.data import load_dataset
    from mecdeploy.training.teacher_classes import classes_of_weights

    return load_dataset(config.data, seed=config.seed, classes=lambda shape: classes_of_weights(config, shape))


def require_test_images(cells: Sequence[Cell]) -> None:
    """Refuse, before anything is trained, data that have no test part with labels. Loads each data set once.

    One whose classes are those of a start that is still to be trained is looked at when it is read.
    """
    from mecdeploy.training.data.source import UNKNOWN

    seen = []
    for cell in cells:
        if cell.config.data not in seen and not (cell.start and cell.config.data.labels == "none"):
            seen.append(cell.config.data)
            test = dataset_of(cell.config).test
            if test is None or bool((test.labels == UNKNOWN).any()):
                lacks = "test part" if test is None else "labels for its test part"
                raise UserError(
                    f"study.test is true, but {cell.config.data.name} has no {lacks}; add it, or set study.test = "
                    "false."
                )


def write_test_accuracies(out: Path) -> None:
    """Measure the final checkpoint of every run in results.jsonl on the test images of its data.

    test.jsonl gets all of them, or is not written.
    """
    records: list[dict[str, Any]] = []
    loaded: list[tuple[tuple[DataConfig, str], ImageSource]] = []  # few, and each takes long to decode
    for found in read_records(out / RESULTS):
        folder = RunFolder(out / RUNS / found["name"])
        config = folder.read_config()
        key = (config.data, config.weights)
        images = next((images for known, images in loaded if known == key), None)
        if images is None:
            images = _test_images(config, folder.path)
            loaded.append((key, images))
        accuracy = _accuracy(folder.path, config, images)
        records.append({**{key: found[key] for key in AXES}, "accuracy": accuracy, "images": len(images)})
    write_json_lines(out / TEST, records)


def _test_images(config: TrainConfig, run: Path) -> ImageSource:
    test = dataset_of(config).test
    if test is None:
        raise UserError(f"{config.data.name} has no test part any more; {run} cannot be tested.")
    return test


def _accuracy(run: Path, config: TrainConfig, test: ImageSource) -> float:
    """Share of the test images that the run gets right, 0..1, in deployed arithmetic."""
    from mecdeploy.training.device import choose_device, place, reproducible
    from mecdeploy.training.evaluate import evaluate
    from mecdeploy.training.run import load_run
    from mecdeploy.training.sensitivity import load_float_network
    from mecdeploy.training.stages import FloatTask, QuantizedTask, Task

    device = choose_device(config.device)
    task: Task
    if config.method == "fp32":
        network, spec, _ = load_float_network(run, config)
        task = FloatTask(place(network, device), spec, label_smoothing=0.0, device=device)
    else:
        model = load_run(run, model_name=config.model.name).model
        place(model, device)
        task = QuantizedTask(model, label_smoothing=0.0, device=device)
    with reproducible(device):
        return evaluate(task, test, device)
