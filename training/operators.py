"""One rule for each of PyTorch's operators that an integer kernel computes: node -> plan.

A rule gets the planner, the node and its arguments by name. It returns the Value that the node makes, or a sentence
that says why the node stays in float. Shapes hold no constant batch: the first axis is the batch's and stays in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mecdeploy.training.arguments import Rule
from mecdeploy.training.arrangement_rules import ARRANGEMENT
from mecdeploy.training.constant_rules import ARITHMETIC
from mecdeploy.training.elementwise_rules import ELEMENTWISE_RULES
from mecdeploy.training.layer_rules import LAYERS
from mecdeploy.training.movement_rules import MOVEMENT
from mecdeploy.training.pool_rules import POOLS

RULES: Mapping[str, Rule] = MappingProxyType(
    {**LAYERS, **ELEMENTWISE_RULES, **ARITHMETIC, **POOLS, **MOVEMENT, **ARRANGEMENT}
)

REFUSED = {
    "conv1d": "only two-dimensional convolutions have one",
    "conv3d": "only two-dimensional convolutions have one",
    "conv_transpose1d": "transposed convolutions have none",
    "conv_transpose2d": "transposed convolutions have none",
    "conv_transpose3d": "transposed convolutions have none",
    "bilinear": "its weights multiply two inputs",
    "lstm": "recurrent layers have none",
    "gru": "recurrent layers have none",
    "rnn_tanh": "recurrent layers have none",
    "rnn_relu": "recurrent layers have none",
    "embedding": "a classifier's image is no index",
}
"""Operators with weights that would silently stay in float, and why they have no kernel."""
