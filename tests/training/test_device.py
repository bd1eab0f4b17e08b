"""Where a network lies in memory."""

from __future__ import annotations

import torch
from torch import nn

from mecdeploy.training.device import place


def test_convolutions_are_laid_out_by_channels_last_and_every_other_tensor_stays() -> None:
    net = nn.Module()
    net.conv = nn.Conv2d(3, 4, 3)
    net.register_buffer("windows", torch.randn(2, 3, 2, 3, 2))
    net.fc = nn.Linear(4, 2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    parameters = list(net.parameters())
    placed = place(net, torch.device("cpu"))
    assert placed.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not placed.conv.weight.is_contiguous()
    assert placed.windows.is_contiguous()
    assert all(torch.equal(tensor, before[name]) for name, tensor in placed.state_dict().items())
    assert all(a is b for a, b in zip(placed.parameters(), parameters, strict=True)), "an optimiser may hold them"
