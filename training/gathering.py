"""Rows of all processes, coded together: what one process with the whole batch would code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mecdeploy.training.config import MecConfig
from mecdeploy.training.mec import sample_index
from mecdeploy.training.recording import Recording
from mecdeploy.training.world import World


def gather_recordings(
    first: Recording, other: Recording | None, config: MecConfig, generator: torch.Generator, world: World
) -> tuple[Recording, Recording | None]:
    """The rows that mec_objective would choose from the whole batch's recordings, from every process; all take part.

    first, other: of this process's share of the batch, one of equal runs. generator: in the same state everywhere; it
    draws what one process would draw. Weights stay: they are the same everywhere. Of mec.samples rows, as many are
    taken as divide by the processes. Gradients are those of the sum of all processes' objectives, which are equal.
    """
    if world.alone or not config.gather:
        return first, other
    limit = max(world.size, config.samples - config.samples % world.size)
    names = [name for kind in config.code if kind == "activations" for name in first.activations]
    features, chosen = 0, list[Tensor]()
    for kind in config.code:  # in the order in which mec_objective draws
        if kind == "features" and first.features is not None:
            views = [first.features] if other is None or other.features is None else [first.features, other.features]
            chosen = [*_choose(views, limit, generator, world), *chosen]
            features = len(views)
        elif kind == "activations":
            chosen += [
                row for tensor in first.activations.values() for row in _choose([tensor], limit, generator, world)
            ]
    if not chosen:
        return first, other
    rows = gather_rows(chosen, world)
    return (
        Recording(
            features=rows[0] if features else first.features,
            activations=dict(zip(names, rows[features:], strict=True)) or first.activations,
            weights=first.weights,
        ),
        Recording(features=rows[1]) if features == 2 else other,
    )


def gather_rows(parts: Sequence[Tensor], world: World) -> list[Tensor]:
    """Of each tensor [m, d], equal in shape everywhere, the rows of all processes by rank: [size * m, d].

    One exchange for all of them; all take part.
    """
    flat = torch.cat([part.flatten() for part in parts])
    gathered: Tensor = _Gather.apply(flat, world)
    pieces = torch.split(gathered, [part.numel() for part in parts], dim=1)
    return [
        piece.reshape(world.size * part.shape[0], *part.shape[1:]) for piece, part in zip(pieces, parts, strict=True)
    ]


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.gather(flat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """What follows is computed alike on every process, so the sum of their gradients needs no exchange."""
        world: World = ctx.world
        return grads[0][world.rank] * world.size, None


def _choose(views: Sequence[Tensor], limit: int, generator: torch.Generator, world: World) -> list[Tensor]:
    """This process's rows among at most `limit` of all processes' [m, C, *positions]; the same of each view: [n, C].

    sample_index takes one row of each of `limit` equal runs. Both the runs and the rows divide by the processes, so
    that every process has the same number of whole runs.
    """
    *counts, channels = views[0].movedim(1, -1).shape
    own = torch.Size(counts).numel()
    total = own * world.size
    rows = [view.movedim(1, -1) for view in views]
    if total <= limit and len(views) == 1:
        return [view.reshape(own, channels) for view in rows]
    index = sample_index(total, limit, generator)
    runs = len(index) // world.size
    mine = index[world.rank * runs : (world.rank + 1) * runs] - world.rank * own
    return [view[torch.unravel_index(mine.to(view.device), counts)] for view in rows]
