"""What each training method quantises by: one row per method.

Imports no torch, so that the command line can read and refuse a config before it pays for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How activations and weights become codes, and how the step sizes of both are found.

    activations: lsq or pact. weights: lsq, lsq+ or dorefa. learned_zero_points: of values of both signs.
    """

    activations: str = "lsq"
    weights: str = "lsq"
    learned_zero_points: bool = False


RULES: Mapping[str, Rules] = MappingProxyType(
    {
        "mec": Rules(),
        "lsq": Rules(),  # Esser et al. 2020, arXiv:1902.08153
        "lsq+": Rules(weights="lsq+", learned_zero_points=True),  # Bhalgat et al. 2020, arXiv:2004.09576
        "pact": Rules(activations="pact", weights="dorefa"),  # Choi et al. 2018, arXiv:1805.06085
        "dorefa": Rules(weights="dorefa"),  # weights of Zhou et al. 2016, arXiv:1606.06160
    }
)
"""Method -> rules (docs/baselines.md)."""
