"""Images and labels, in an order and with augmentations that depend on nothing but (seed, epoch, step)."""

from mecdeploy.training.data.decode import decode_image
from mecdeploy.training.data.load import available_datasets, load_dataset
from mecdeploy.training.data.order import step_count
from mecdeploy.training.data.source import Batch, ImageDataset, ImageSource

__all__ = [
    "Batch",
    "ImageDataset",
    "ImageSource",
    "available_datasets",
    "decode_image",
    "load_dataset",
    "step_count",
]
