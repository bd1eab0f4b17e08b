"""What one forward pass leaves behind for the coding objective."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(kw_only=True)
class Recording:
    """Tensors of one forward pass, all attached to the autograd graph.

    features: [m, d] pooled features before the classifier, dequantised; None unless asked for.
    activations: unit output name -> dequantised output of that unit, [m, C, H, W] or [m, d].
    weights: unit name -> fake-quantised weights, [O, I * kh * kw].
    """

    features: Tensor | None = None
    activations: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
