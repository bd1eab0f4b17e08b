"""The full-precision network as an ONNX file: what a demo compares size and latency with.

Written here from the same plans that quantisation starts from, BatchNorm folded: torch.onnx needs onnxscript for its
new exporter and is dropping the old one, and neither is worth a dependency for eight operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from mecdeploy.training.patterns import Plan, plan_units

INPUT, OUTPUT = "image", "logits"
_OPSET, _IR_VERSION = 21, 10  # as the quantised file, so that both meet the same runtime


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))

    def weight(self, name: str, tensor: Tensor) -> str:
        self.weights.append(numpy_helper.from_array(tensor.detach().float().contiguous().numpy(), name))
        return name


@torch.no_grad()
def float_onnx(model: nn.Module, *, channels: int, height: int, width: int) -> bytes:
    """A classifier that `prepare` can quantise, as float32 ONNX: "image", normalised [N, C, H, W], to "logits".

    model: in evaluation mode, on the CPU. Raises TrainingError for an operator that `prepare` would refuse too.
    """
    plans = plan_units(fx.symbolic_trace(model))
    graph = _Graph()
    classes = 0
    for plan in plans.by_name.values():
        target = OUTPUT if plan.name == plans.output else plan.name
        reads = [INPUT if read not in plans.by_name else read for read in plan.reads]
        _EMITTERS[plan.kind](graph, plan, reads, f"{target}/sum" if plan.relu else target)
        if plan.maximum is not None:
            bounds = [
                graph.weight(f"{target}/low", torch.zeros(())),
                graph.weight(f"{target}/high", torch.tensor(plan.maximum)),
            ]
            graph.add("Clip", [f"{target}/sum", *bounds], target)
        elif plan.relu:
            graph.add("Relu", [f"{target}/sum"], target)
        if plan.name == plans.output:
            assert isinstance(plan.layer, nn.Linear)
            classes = plan.layer.out_features
    source = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", channels, height, width])
    logits = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["N", classes])
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "float", [source], [logits], graph.weights),
        ir_version=_IR_VERSION,
        opset_imports=[helper.make_opsetid("", _OPSET)],
    )
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString())


def _weighted(graph: _Graph, plan: Plan, reads: list[str], output: str) -> None:
    layer = plan.layer
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    weight, bias = _folded(layer, plan.batch_norm)
    inputs = [*reads, graph.weight(f"{plan.name}/weight", weight), graph.weight(f"{plan.name}/bias", bias)]
    if isinstance(layer, nn.Linear):
        graph.add("Gemm", inputs, output, transB=1)
        return
    assert not isinstance(layer.padding, str)
    graph.add(
        "Conv",
        inputs,
        output,
        kernel_shape=layer.kernel_size,
        strides=layer.stride,
        pads=[*layer.padding, *layer.padding],
        dilations=layer.dilation,
        group=layer.groups,
    )


def _folded(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """Weight and bias with BatchNorm's affine map in them, worked out in float64."""
    weight = layer.weight.double()
    bias = torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else layer.bias.double()
    if norm is None:
        return weight, bias
    assert norm.running_mean is not None and norm.running_var is not None
    gain = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return weight * gain.view(-1, 1, 1, 1), norm.bias.double() + (bias - norm.running_mean.double()) * gain


def _max_pool(graph: _Graph, plan: Plan, reads: list[str], output: str) -> None:
    pool = plan.layer
    assert isinstance(pool, nn.MaxPool2d)

    def pair(size: Any) -> list[int]:
        return list(size) if isinstance(size, tuple | list) else [size, size]

    graph.add(
        "MaxPool",
        reads,
        output,
        kernel_shape=pair(pool.kernel_size),
        strides=pair(pool.stride),
        pads=pair(pool.padding) * 2,
        dilations=pair(pool.dilation),
        ceil_mode=int(pool.ceil_mode),
    )


_EMITTERS: dict[str, Callable[[_Graph, Plan, list[str], str], None]] = {
    "weighted": _weighted,
    "max_pool": _max_pool,
    "add": lambda graph, plan, reads, output: graph.add("Add", reads, output),
    "average_pool": lambda graph, plan, reads, output: graph.add("GlobalAveragePool", reads, output),
    "flatten": lambda graph, plan, reads, output: graph.add("Flatten", reads, output, axis=1),
    "dropout": lambda graph, plan, reads, output: graph.add("Identity", reads, output),
}
