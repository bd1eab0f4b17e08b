"""One Add per quantisation of its sum.

onnxruntime fuses an Add with the one QuantizeLinear behind it. With two (8 bits for the next Add, act_bits for the next
convolution) it keeps a float Add; a second Add over the same integers costs nothing measurable and both stay integer.
"""

from __future__ import annotations

from dataclasses import replace

from mecdeploy.export.config import ExportConfig
from mecdeploy.export.graph import Add, IntegerGraph, Node


def split_add_outputs(graph: IntegerGraph, config: ExportConfig) -> IntegerGraph:
    """Replace every Add of n > 1 outputs by n Adds of the same inputs, each named after the output it writes."""
    nodes: list[Node] = []
    for node in graph.nodes:
        if isinstance(node, Add) and len(node.outputs) > 1:
            nodes.extend(replace(node, name=output, outputs=(output,)) for output in node.outputs)
        else:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes))
