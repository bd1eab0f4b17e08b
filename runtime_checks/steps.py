"""One kernel of the plan: what the tables of products, pools, elementwise operators and movement are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx
from numpy.typing import NDArray

from mecdeploy.runtime_checks.patterns import Graph, Quantized

Array = NDArray[Any]


@dataclass(frozen=True)
class Step:
    """One kernel: reads tensors by name, writes one tensor."""

    output: str
    inputs: tuple[str, ...]
    compute: Callable[..., Array]


Requantizing: TypeAlias = Callable[[Graph, onnx.NodeProto, Quantized], Step]
"""A step for a node between DequantizeLinear and QuantizeLinear: (graph, node, what it is quantised to)."""

Table: TypeAlias = Mapping[str, Requantizing]
"""Steps by op type."""
