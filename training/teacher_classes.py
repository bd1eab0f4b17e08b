"""Which classes a run without labels has: those of the network that teaches it."""

from __future__ import annotations

from pathlib import Path

from mecdeploy.training.checkpoint import read_header
from mecdeploy.training.config import TrainConfig
from mecdeploy.training.data.image_folder import Shape
from mecdeploy.training.data.unlabelled import KnownClasses
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.initial import class_count, read_weights
from mecdeploy.training.models import build_model
from mecdeploy.training.names import are_published
from mecdeploy.training.published import published_weights
from mecdeploy.training.retention import CheckpointFolder


def recorded_classes(out: Path) -> KnownClasses | None:
    """Those of the run in `out`, which may outlive its weights; None without a readable checkpoint."""
    for position in reversed(CheckpointFolder(out).positions()):
        try:
            header = read_header(out / position.file_name)
        except TrainingError:
            continue  # the run itself says so, and goes back to an older one
        return KnownClasses(names=tuple(header["class_names"]), named=True)
    return None


def classes_of_weights(config: TrainConfig, shape: Shape) -> KnownClasses:
    """Those of config.weights: the names in a checkpoint of ours, else "0" to as many as the classifier has outputs.

    shape: of the images, for which the network is made to find its classifier. TrainingError as `read_weights`,
    `build_model` and `class_count`.
    """
    published = are_published(config.weights)
    weights = published_weights(config.model.name, config.weights) if published else read_weights(Path(config.weights))
    if weights.class_names:
        return KnownClasses(names=weights.class_names, named=True)
    network = build_model(
        config.network, num_classes=2, channels=shape.channels, height=shape.height, width=shape.width
    )
    return KnownClasses(names=tuple(str(index) for index in range(class_count(network, weights))), named=False)
