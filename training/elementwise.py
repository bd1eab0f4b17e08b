"""Functions of single positions that an integer kernel computes: one entry each.

docs/adding-an-operator.md adds one to this table, to the export room's and to the witness'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mecdeploy.training import deployed
from mecdeploy.training.quantizers import ActivationQuantizer, QTensor


@dataclass(frozen=True)
class Elementwise:
    """A function of reals, and the integer kernel that computes it: the same arguments, then the output's quantiser.

    real: (reals..., alpha) -> reals. deployed: (quantised..., quantiser, alpha) -> quantised.
    """

    real: Callable[..., Tensor]
    deployed: Callable[..., QTensor]


def _multiply(a: QTensor, b: QTensor, output: ActivationQuantizer, alpha: float) -> QTensor:
    return deployed.multiply(a, b, output)


ELEMENTWISE: Mapping[str, Elementwise] = MappingProxyType(
    {
        "mul": Elementwise(lambda a, b, alpha: a * b, _multiply),
        "sigmoid": Elementwise(lambda x, alpha: torch.sigmoid(x), lambda x, output, alpha: deployed.sigmoid(x, output)),
        "hard_sigmoid": Elementwise(
            lambda x, alpha: F.hardsigmoid(x), lambda x, output, alpha: deployed.hard_sigmoid(x, output)
        ),
        "leaky_relu": Elementwise(lambda x, alpha: F.leaky_relu(x, alpha), deployed.leaky_relu),
    }
)


def real(function: str, inputs: tuple[QTensor, ...], alpha: float) -> Tensor:
    """What a function makes of the reals, with gradients of its own."""
    return ELEMENTWISE[function].real(*(x.dequantize() for x in inputs), alpha)


def integer(function: str, inputs: tuple[QTensor, ...], output: ActivationQuantizer, alpha: float) -> Any:
    """What the integer kernel makes of the codes, with straight-through gradients."""
    return ELEMENTWISE[function].deployed(*inputs, output, alpha)
