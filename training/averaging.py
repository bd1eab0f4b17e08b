"""An exponential moving average of a network's parameters, and BatchNorm statistics that fit it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.movement import DropoutUnit
from mecdeploy.training.units import WeightedUnit

STATISTICS_BATCHES = 50
"""Training batches over which statistics are taken, as in the code of Nagel et al. 2022 (arXiv:2203.11086)."""


class WeightAverage:
    """Moving average of every parameter of a network: weights, biases, BatchNorm's gamma and beta, step sizes.

    After step t (from 0): average <- d * average + (1 - d) * parameter, d = min(decay, (1 + t) / (10 + t)), so that
    the first steps do not count for longer than they should. It begins at the parameters as they are. No state but the
    average itself, and nothing waits for a GPU.
    Source: Gupta and Asthana 2023 (arXiv:2311.05109), who average latent weights and step sizes of QAT against
    oscillations; the rising decay is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, network: QuantizedModel, decay: float) -> None:
        named = dict(network.named_parameters())
        self.decay = decay
        self._parameters: list[Tensor] = list(named.values())
        self.tensors = {name: parameter.detach().clone() for name, parameter in named.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after optimiser step `step`, from 0, of the live stage."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), self._parameters, 1.0 - decay)

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Become the average that was saved."""
        for name, tensor in self.tensors.items():
            tensor.copy_(saved[name])

    @torch.no_grad()
    def put_in(self) -> None:
        """Give the network the average for its parameters; its BatchNorm statistics do not fit them."""
        for parameter, average in zip(self._parameters, self.tensors.values(), strict=True):
            parameter.copy_(average)


@torch.no_grad()
def estimate_statistics(network: QuantizedModel, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of a live network to the means over batches of its batch statistics.

    batches: uint8 [N, C, H, W], of images as training sees them. Dropout is off, as it will be.
    """
    norms = [unit.batch_norm for unit in network.units().values() if isinstance(unit, WeightedUnit)]
    kept = [(norm, norm.momentum) for norm in norms if norm is not None]
    was_training = network.training
    network.train()
    for unit in network.units().values():
        if isinstance(unit, DropoutUnit):
            unit.eval()
    try:
        for index, batch in enumerate(batches):
            for norm, _ in kept:
                norm.momentum = 1.0 / (index + 1)
            network(batch)
    finally:
        for norm, momentum in kept:
            norm.momentum = momentum
        network.train(was_training)
