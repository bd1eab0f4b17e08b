"""What is wrong with a file although onnxruntime takes it: integer kernels that cannot do what the file says."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from mecdeploy.runtime_checks import weight_reasons
from mecdeploy.runtime_checks.inspection_report import LayerFacts, Promises
from mecdeploy.runtime_checks.patterns import Graph


def cautions(graph: Graph, node: onnx.NodeProto, layer: LayerFacts) -> Iterator[str]:
    """A sentence for each fault of a layer. Tests run such files, and see them fail or compute something else.

    Of what keeps a layer in float, versions of onnxruntime check different parts: 1.24 fuses where 1.32 refuses.
    """
    if layer.arithmetic != "integer":
        return
    faults = [*weight_reasons.layout(graph, node), *weight_reasons.bias_scale(graph, node)]
    faults += [reason for reason in weight_reasons.weight(graph, node) if reason.kind == "weight-blocks"]
    for reason in faults:
        yield (
            f"{layer.name}: {reason.what}. {layer.kernel} takes no notice: it fails, or computes something else than "
            "the file says."
        )
    for side, stored in (("input", layer.input), ("output", layer.output)):
        if stored is not None and stored.scales > 1:
            yield (
                f"{layer.name}: its {side} has {stored.scales} scales. {layer.kernel} takes one for the whole tensor: "
                "it fails when it runs."
            )


def broken_promises(layer: LayerFacts, metadata: Promises | None) -> Iterator[str]:
    """Where mecdeploy's metadata says other bits than the weights of a layer are stored at."""
    promised = (metadata.weight_bits or {}).get(layer.name) if metadata is not None else None
    if promised is not None and promised != layer.weights.stored_bits:
        stored = layer.weights.stored_bits
        yield f"{layer.name}: its weights are stored at {stored} bits, the metadata promises {promised}."
