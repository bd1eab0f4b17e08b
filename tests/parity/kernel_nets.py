"""Small classifiers, [N, 3, 12, 12] to [N, 6], each for one kernel or arrangement of kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, SIZE = 6, 12


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Net(nn.Module):
    """A stem of 8 channels and half the size, a body, and a linear layer on its means."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.stem, self.body = _conv(3, 8, stride=2), body
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.body(F.relu(self.stem(x))).mean((2, 3)))
        return logits


class Excited(nn.Module):
    """Squeeze and excitation behind a depthwise convolution, with the gate of choice, and a residual sum."""

    def __init__(self, gate: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.expand, self.depthwise = _conv(8, 16, 1), _conv(16, 16, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project, self.gate, self.activation = _conv(16, 8, 1), gate, activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.depthwise(self.activation(self.expand(x))))
        scale = self.gate(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        projected: Tensor = self.project(y * scale)
        return x + projected


class Dense(nn.Module):
    """Two layers of DenseNet: BatchNorm and ReLU before each convolution, everything so far side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * index) for index in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * index, 4, 3, padding=1, bias=False) for index in range(2))
        self.transition = nn.Conv2d(16, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = torch.cat([x, conv(F.relu(norm(x)))], 1)
        return F.avg_pool2d(self.transition(F.relu(self.norms[-1](x))), 2)


class Shuffled(nn.Module):
    """ShuffleNetV2's unit: half of the channels go past, the channels change places."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv(4, 4, 1), nn.ReLU(), _conv(4, 4, groups=4), _conv(4, 4, 1), nn.ReLU())
        self.after = _conv(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            kept, changed = x.chunk(2, dim=1)
            x = torch.cat([kept, self.branch(changed)], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return F.relu(self.after(x))


class Pooled(nn.Module):
    """Inception's branches: windowed means of both kinds, a maximum, and a convolution, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = _conv(8, 4, 1), _conv(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.a(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        second = F.leaky_relu(self.b(F.avg_pool2d(x, 3, 1, 1)), 0.1)
        joined = torch.cat([first, second, F.max_pool2d(x, 3, 1, 1)], 1)
        return F.adaptive_avg_pool2d(joined, (3, 2))


class Squeezed(nn.Module):
    """SqueezeNet: fire modules, and a convolution and a pool instead of a linear layer at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.squeeze, self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, padding=1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Conv2d(16, CLASSES, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(F.max_pool2d(F.relu(self.stem(x)), 3, 2, ceil_mode=True)))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return torch.flatten(self.classifier(x), 1)


class Transformer(nn.Module):
    """A ViT of one block: patches, class token, positions, attention, MLP."""

    def __init__(self, width: int = 16, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.positions = nn.Parameter(torch.randn(1, (SIZE // patch) ** 2 + 1, width) * 0.1)
        self.first, self.second, self.last = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        y = self.first(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.second(x))
        logits: Tensor = self.head(self.last(x)[:, 0])
        return logits


class Reused(nn.Module):
    """One convolution called twice, ReLUs that are read around, a sum in place, padding by reflection at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = _conv(8, 8)
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = F.relu(y) + y
        z = self.conv(F.max_pool2d(y, 2, 1, padding=1)[:, :, :-1, :-1])
        z += y
        return F.relu(self.reflect(z))


class Wide(nn.Module):
    """Filters that divide into fours, with groups enough for codebooks, and a depthwise layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise, self.last = _conv(8, 24), _conv(24, 24, groups=24), _conv(24, 40, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(F.relu(self.depthwise(F.relu(self.first(x))))))


KERNEL_NETS: dict[str, Callable[[], nn.Module]] = {
    "SE, sigmoid": lambda: Net(Excited(nn.Sigmoid(), nn.SiLU()), 8),
    "SE, hard sigmoid": lambda: Net(Excited(nn.Hardsigmoid(), nn.Hardswish()), 8),
    "dense": lambda: Net(Dense(), 8),
    "shuffled": lambda: Net(Shuffled(), 8),
    "pooled": lambda: Net(Pooled(), 16),
    "squeezed": Squeezed,
    "transformer": Transformer,
    "reused": lambda: Net(Reused(), 8),
    "wide": lambda: Net(Wide(), 40),
}
"""Name -> network."""
