"""Accuracy over a data source."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mecdeploy.training.data import ImageSource
from mecdeploy.training.stages import Task
from mecdeploy.training.world import ALONE, World

BATCH_SIZE = 256
"""Images on each process."""


def evaluate(
    task: Task,
    source: ImageSource,
    device: torch.device,
    between: Callable[[], None] = lambda: None,
    *,
    answers: Callable[[Tensor], Tensor] | None = None,
    world: World = ALONE,
) -> float:
    """Share of the images of `source` whose largest logit is their label's, in evaluation mode, 0..1.

    answers: uint8 pixels [m, C, H, W] -> class indices [m], to take the place of labels.
    For a quantised network that is the deployed arithmetic. between: called after each batch; what it raises stops the
    evaluation. The network's mode is restored. world: every process counts its share of the images; all take part.
    """
    was_training = task.network.training
    task.network.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    try:
        with torch.no_grad():
            for batch in source.batches(BATCH_SIZE * world.size, device=device, share=world.share):
                if len(batch.labels):  # the last batch may have fewer images than there are processes
                    pixels = batch.images[0]
                    expected = batch.labels.to(device) if answers is None else answers(pixels)
                    correct += (task.logits(pixels).argmax(1) == expected).sum()
                between()
    finally:
        task.network.train(was_training)
    return int(world.sum(correct)) / len(source)
