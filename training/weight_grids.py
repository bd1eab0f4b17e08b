"""Weight quantisers on other grids than the plain signed range (docs/weight-grids.md), and which layer has which.

The kernels are int8 whatever the storage: any table of int8 levels costs the bits of its indices alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mecdeploy.training.lsq import clamp_scaling_gradient, scale_gradient
from mecdeploy.training.odd_grid import quantize_odd, search_odd_steps
from mecdeploy.training.quantizers import SMALLEST_STEP
from mecdeploy.training.table_grid import LARGEST_CODE, fit_table, look_up
from mecdeploy.training.weight_quantizers import AnyWeightQuantizer, WeightQuantizer, make_weight_quantizer

VECTOR_WIDTH = 4
"""Successive weights that a codebook's vector holds: a byte of 256 vectors is then 2 bits a weight."""
MOST_VECTORS, FEWEST_VECTORS = 256, 16
GROUPS_PER_VECTOR = 8
"""Of a layer, at least, for each vector: the table is then at most half as large as what it is for."""


class MidriseWeightQuantizer(WeightQuantizer):
    """Odd codes of a weight [O, ...] with a learned step for each output channel: `quantize_odd`."""

    @property
    def lower(self) -> int:
        """Smallest code."""
        return -self.upper

    @property
    def upper(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    @property
    def levels(self) -> Tensor:
        """int8 [2^bits], ascending: what codes can be."""
        return torch.arange(self.lower, self.upper + 1, 2, dtype=torch.int8)

    def fit(self, weight: Tensor) -> None:
        """Set the steps that lose least of a weight [O, ...]."""
        self.step.copy_(search_odd_steps(weight.flatten(1), self.bits))

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [O, ...] and step [O]."""
        factor = (weight[0].numel() * self.upper) ** -0.5
        step = clamp_scaling_gradient(self.step, SMALLEST_STEP, float("inf"), factor)
        return quantize_odd(weight, step.view(-1, *[1] * (weight.dim() - 1)), self.bits), step


class TernaryWeightQuantizer(WeightQuantizer):
    """Codes -1, 0 and 1 of a weight [O, ...]: LSQ with these bounds."""

    @property
    def lower(self) -> int:
        """Smallest code."""
        return -1

    @property
    def levels(self) -> Tensor:
        """int8 [3]: what codes can be."""
        return torch.tensor([-1, 0, 1], dtype=torch.int8)


class TableWeightQuantizer(WeightQuantizer):
    """Each `width` successive weights of a filter, [O, ...], as the nearest row of a learned table of int8 entries.

    step: learned, for each channel; LARGEST_CODE / 2^(bits-1) times what one code stands for, so that it is as large as
    the uniform grid's and learns as fast. table: [rows * width], learned, in units of LARGEST_CODE codes; flat, because
    what has one axis does not decay. Its entries are rounded to int8 in every pass, straight-through: what trains is
    what runs.
    """

    def __init__(self, bits: int, channels: int, *, rows: int, width: int) -> None:
        super().__init__(bits, channels)
        self.rows, self.width = rows, width
        self.table = nn.Parameter(torch.linspace(-1.0, 1.0, rows * width))

    @property
    def lower(self) -> int:
        """Smallest code."""
        return -LARGEST_CODE

    @property
    def upper(self) -> int:
        """Largest code."""
        return LARGEST_CODE

    @property
    def codes_per_step(self) -> float:
        """Codes in one step."""
        return LARGEST_CODE / (1 << (self.bits - 1))

    @property
    def levels(self) -> Tensor:
        """int8, what codes can be: [n] ascending, equal ones once; or [rows, width], the table as it is.

        How many rows a codebook has says how many bits its positions take, however many have come to be equal.
        """
        entries = self._entries().detach().to(torch.int8)
        found: Tensor = torch.unique(entries) if self.width == 1 else entries
        return found

    def fit(self, weight: Tensor) -> None:
        """Set step and table such that they lose little of a weight [O, ...]."""
        step, table = fit_table(weight.flatten(1), self.rows, self.width)
        self.step.copy_(step * self.codes_per_step)
        self.table.copy_(table.flatten())

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [O, ...] and what one of them stands for, [O].

        The step's gradient has LSQ's factor. The table's, our own: an entry gets the sum of its members' gradients, n
        of them on average, and has the unit of a weight only after multiplication with the reach LARGEST_CODE * step.
        With the factor 1 / (n reach^2) an update moves entry * reach by the mean of the members' gradients, as far as
        it moves them. (With LSQ's n^(-1/2) a level that all its members pull at overshoots once BatchNorm is frozen.)
        """
        factor = (weight[0].numel() * ((1 << (self.bits - 1)) - 1 or 1)) ** -0.5
        step = clamp_scaling_gradient(self.step, SMALLEST_STEP, float("inf"), factor) / self.codes_per_step
        members = weight.numel() / self.width / self.rows
        reach = LARGEST_CODE * step.detach().mean()
        table = self._entries(1.0 / (members * reach.square()))
        return look_up(weight, step.view(-1, *[1] * (weight.dim() - 1)), table), step

    def _entries(self, factor: float | Tensor = 1.0) -> Tensor:
        """The table in codes, [rows, width], its gradient times factor; one that is held at an end can come back."""
        table = scale_gradient(self.table, factor) * LARGEST_CODE
        codes = table.detach().round().clamp(-LARGEST_CODE, LARGEST_CODE)
        return (codes + (table - table.detach())).view(self.rows, self.width)


def codebook_rows(weight: Tensor) -> int:
    """How many vectors a layer's codebook holds; 0 where it has none.

    Filters that VECTOR_WIDTH does not divide have none. GROUPS_PER_VECTOR bounds what the table, VECTOR_WIDTH bytes a
    vector, adds to a byte a group; with at most 16 vectors a group would not need its byte.
    """
    if weight[0].numel() % VECTOR_WIDTH:
        return 0
    rows = min(MOST_VECTORS, weight.numel() // VECTOR_WIDTH // GROUPS_PER_VECTOR)
    return rows if rows > FEWEST_VECTORS else 0


def choose_weight_quantizer(weight: Tensor, bits: int, grid: str, rule: str = "lsq") -> AnyWeightQuantizer:
    """The quantiser of a layer's weight [O, ...] on a grid of WEIGHT_GRIDS, its steps yet to be found.

    rule: of the uniform grid. A grid that has no form at this width leaves the layer uniform: all of them at 8 bits,
    ternary and codebook at any but 2, and codebook where codebook_rows has none. The plain range of 1 bit would be -1
    and 0: there every uniform layer is mid-rise.
    """
    channels = weight.shape[0]
    if grid == "levels" and bits < 8:
        return TableWeightQuantizer(bits, channels, rows=1 << bits, width=1)
    if grid == "codebook" and bits == 2 and codebook_rows(weight):
        return TableWeightQuantizer(bits, channels, rows=codebook_rows(weight), width=VECTOR_WIDTH)
    if grid == "ternary" and bits == 2:
        return TernaryWeightQuantizer(bits, channels)
    if bits == 1 or (grid == "midrise" and bits < 8):
        return MidriseWeightQuantizer(bits, channels)
    return make_weight_quantizer(bits, channels, rule)
