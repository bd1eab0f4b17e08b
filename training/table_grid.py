"""Learned tables as pure functions: each weight, or each few successive ones, the nearest row of a table of int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mecdeploy.training.composed import composing
from mecdeploy.training.quantizers import SMALLEST_STEP

LARGEST_CODE = 127
"""Of an int8 with its negative; an entry of this size is a table's largest."""

ROWS_AT_ONCE = 1 << 16
"""Whose distances to all rows of a table are in memory together: at most 64 MB."""

SEEDED_GROUPS = 1 << 14
ROUNDS = 15


class _LookUp(torch.autograd.Function):
    """Regions: inside (between the table's smallest and largest entry), outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, table: Tensor) -> Tensor:
        ratio = x / step
        index = nearest(ratio.reshape(-1, table.shape[1]), table)
        ctx.save_for_backward(ratio, step, table, index)
        return torch.where(ratio.isnan(), ratio, table[index].reshape(x.shape))  # what diverged has no nearest row

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ratio, step, table, index = ctx.saved_tensors
        inside = (ratio > table.amin()) & (ratio < table.amax())
        grad_x = grads[0] * inside / step
        grad_table = torch.zeros_like(table).index_add_(0, index, grads[0].reshape(-1, table.shape[1]))
        return grad_x, -(grad_x * ratio).sum_to_size(step.shape), grad_table


def look_up(x: Tensor, step: Tensor, table: Tensor) -> Tensor:
    """Map reals to codes: each `width` successive x / step become the nearest row of the table.

    x: [O, ...], read in C order; step: broadcasts to x, > 0; table: [rows, width] of integers, width divides x[0].
    Gradients are straight-through, our own in the way of LSQ: d codes/dx = 1/step and d codes/d step = -x/step^2 inside
    the table's entries, 0 outside. d codes/d table is 1 between a row and whatever became it, so that with real = codes
    * step a row's gradient is the sum of its members', each times its step.
    """
    if composing():
        ratio = x / step
        fixed, entries = ratio.detach(), table.detach()
        inside = (fixed > entries.amin()) & (fixed < entries.amax())
        index = nearest(fixed.reshape(-1, table.shape[1]), entries)
        return table[index].reshape(x.shape) + (ratio - fixed) * inside
    codes: Tensor = _LookUp.apply(x, step, table)
    return codes


def nearest(rows: Tensor, table: Tensor) -> Tensor:
    """Index [n] of the table's row, [k, width], that is nearest to each of rows, [n, width]; of equal ones the first.

    One column is compared with the middles of neighbours; more with all rows, by |x - t|^2 less |x|^2.
    """
    if table.shape[1] == 1:
        ordered, order = table[:, 0].sort(stable=True)
        return order[torch.bucketize(rows[:, 0].contiguous(), (ordered[1:] + ordered[:-1]) / 2)]
    square = table.square().sum(1)
    return torch.cat([(square - 2 * part @ table.T).argmin(1) for part in torch.split(rows, ROWS_AT_ONCE)])


@torch.no_grad()
def fit_table(weight: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Step [O] and table [rows, width], its largest entry 1 or -1, that lose little of a weight [O, n] in mean square.

    real = LARGEST_CODE * table[index] * step. k-means over the weights of each channel divided by a step, at first
    their root mean square: seeds as in k-means++, then ROUNDS times every group to its nearest row, every row to what
    loses least of its members, every step to what loses least of its channel, in closed form. Members count by the
    square of their step, so that what is lost is lost of the weights themselves (our own: alternating least squares).
    A channel of zeros gets the smallest step. Deterministic.
    """
    norm = weight.square().mean(1).sqrt()
    step = norm.clamp_min(SMALLEST_STEP)
    groups = weight.reshape(len(weight), -1, width)
    counted = step.square()[:, None].expand(groups.shape[:2]).reshape(-1)
    table = seeds((groups / step[:, None, None]).reshape(-1, width), counted, rows)
    for _ in range(ROUNDS):
        index = nearest((groups / step[:, None, None]).reshape(-1, width), table)
        counted = step.square()[:, None].expand(groups.shape[:2]).reshape(-1)
        members = torch.zeros_like(table[:, 0]).index_add_(0, index, counted)[:, None]
        sums = torch.zeros_like(table).index_add_(0, index, (groups * step[:, None, None]).reshape(-1, width))
        table = torch.where(members > 0, sums / members, table)
        codes = table[index].reshape(weight.shape)
        fitted = (weight * codes).sum(1) / codes.square().sum(1)
        step = torch.where(fitted > SMALLEST_STEP, fitted, step)
    largest = table.abs().amax().clamp_min(SMALLEST_STEP)
    return (step * largest / LARGEST_CODE).clamp_min(SMALLEST_STEP), table / largest


def seeds(groups: Tensor, counted: Tensor, rows: int) -> Tensor:
    """First rows of a table, [rows, width]: groups [n, width] drawn one by one, the far ones likelier.

    counted: [n], what each counts. A group's chance is that times its squared distance to the nearest one drawn so far:
    k-means++, Arthur and Vassilvitskii 2007, sec. 2.2. At most SEEDED_GROUPS of the groups, evenly spread, are looked
    at, on the CPU and from a seed of their own.
    """
    stride = -(-len(groups) // SEEDED_GROUPS)
    found, counted = groups[::stride].double().cpu(), counted[::stride].double().cpu()
    generator = torch.Generator().manual_seed(0)
    never_zero = torch.finfo(torch.float64).tiny
    chances, distance = counted, torch.full_like(counted, float("inf"))
    drawn: list[Tensor] = []
    for _ in range(rows):
        drawn.append(found[torch.multinomial(chances + never_zero, 1, generator=generator)])
        distance = torch.minimum(distance, (found - drawn[-1]).square().sum(1))
        chances = counted * distance
    return torch.cat(drawn).to(groups)
