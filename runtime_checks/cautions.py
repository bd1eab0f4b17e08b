"""What is wrong with a file although onnxruntime takes it: integer kernels that cannot do what the file says."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from mecdeploy.runtime_checks.inspection_report import LayerFacts
from mecdeploy.runtime_checks.layers import find_weight
from mecdeploy.runtime_checks.patterns import Graph


def cautions(graph: Graph, node: onnx.NodeProto, layer: LayerFacts) -> Iterator[str]:
    """A sentence for each fault of a layer. Tests run such files, and see them fail or compute wrongly."""
    if layer.arithmetic != "integer":
        return
    found = find_weight(graph, node, 1) if node.op_type == "Conv" else None
    if found is not None and found.axis is not None and found.axis % found.constant.value.ndim != 0:
        yield (
            f"{layer.name}: the scales of its weight lie along axis {found.axis}, but {layer.kernel} takes one for "
            "each output channel (axis 0): it fails, or computes something else than the file says."
        )
    for side, stored in (("input", layer.input), ("output", layer.output)):
        if stored is not None and stored.scales > 1:
            yield (
                f"{layer.name}: its {side} has {stored.scales} scales, but {layer.kernel} takes one for the whole "
                "tensor: it fails when it runs."
            )
