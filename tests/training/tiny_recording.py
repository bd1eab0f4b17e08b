"""What one forward pass of a small network leaves behind, for tests of the objective."""

from __future__ import annotations

import torch
from torch import Tensor

from mecdeploy.training.recording import Recording


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def recording(seed: int = 0, samples: int = 24) -> Recording:
    """What a small network with two units leaves behind, as leaves of the graph."""
    generator = seeded(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).relu().requires_grad_()

    return Recording(
        features=leaf(samples, 12),
        activations={"conv": leaf(samples, 6, 5, 4), "fc": leaf(samples, 10)},
        weights={"conv": leaf(6, 27), "fc": leaf(10, 12)},
    )
