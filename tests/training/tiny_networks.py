"""Float classifiers of a few layers for tests of whole quantised models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training.input_spec import InputSpec

SPEC = InputSpec.from_statistics(channels=3, height=8, width=8, mean=120.7, std=64.1)


class TinyResidual(nn.Module):
    """Stem, max pool, two residual blocks (their sum is read at two precisions), dropout, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.second = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.stem_bn, self.first_bn, self.second_bn = (nn.BatchNorm2d(6) for _ in range(3))
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.25)
        self.hidden = nn.Linear(6, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 8, 8] to [N, 4]."""
        x = self.pool(F.relu(self.stem_bn(self.stem(x))))
        x = F.relu(self.first_bn(self.first(x)) + x)
        x = F.relu(self.second_bn(self.second(x)) + x)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        logits: Tensor = self.fc(self.dropout(F.relu(self.hidden(x))))
        return logits


def tiny_residual(seed: int = 0) -> TinyResidual:
    """One with random weights, BatchNorms away from 0 and 1, and gammas of both signs."""
    torch.manual_seed(seed)
    model = TinyResidual()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias, 0.0, 0.5)
        assert norm.running_mean is not None and norm.running_var is not None
        nn.init.normal_(norm.running_mean, 0.0, 0.3)
        nn.init.uniform_(norm.running_var, 0.1, 2.0)
    return model


def images(count: int, seed: int = 0) -> Tensor:
    """uint8 [count, 3, 8, 8]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
