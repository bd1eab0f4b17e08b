"""lower on general networks: the graph alone, read by a witness, computes the integers of evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from integer_witness import evaluate
from onnx_sessions import expose_units
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.export.capture import lower
from mecdeploy.export.compiler import export_model
from mecdeploy.export.config import ExportConfig
from mecdeploy.export.graph import Concat, Elementwise, FloatIsland, Gemm, Quantize
from mecdeploy.export.validation import validate_graph
from mecdeploy.training.calibration import calibrate
from mecdeploy.training.config import QuantConfig
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.preparation import prepare

SPEC = InputSpec.from_statistics(channels=3, height=10, width=8, mean=120.7, std=64.1)


class General(nn.Module):
    """Every elementwise kernel, both means, all movements, and a concat of signed and rectified values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 4, 3, padding="same"),
        )
        self.norm, self.gate, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 1)
        self.tokens, self.fc = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 10, 8] to [N, 5]."""
        first, second = self.stem(x).chunk(2, 1)
        x = torch.cat([self.a(first), F.relu(self.b(F.leaky_relu(second, 0.1)))], 1)
        x = x.view(x.shape[0], 2, 4, 10, 8).transpose(1, 2).reshape(x.shape[0], 8, 10, 8)
        x = F.hardswish(F.avg_pool2d(F.relu(self.norm(x)) + x, 2))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = F.silu(self.last(x))[:, :, 1:]
        x = F.relu(self.tokens(x.flatten(2).transpose(1, 2)))
        logits: Tensor = self.fc(x[:, 3])
        return logits


class Attention(nn.Module):
    """Patches, a class token, one LayerNorm and attention, of which only the linear layers are integers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.qkv, self.out, self.fc = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 10, 8] to [N, 5]."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm(x)).chunk(3, -1))  # one head
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        logits: Tensor = self.fc(x[:, 0])
        return logits


def pixels(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 10, 8), dtype=torch.uint8, generator=generator)


def calibrated(network: type[nn.Module], **config: int | str) -> QuantizedModel:
    torch.manual_seed(0)
    model = network()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)
        assert norm.running_var is not None
        nn.init.uniform_(norm.running_var, 0.1, 1.0)
    quantized = prepare(model, QuantConfig(**config), SPEC)  # type: ignore[arg-type]
    calibrate(quantized, [pixels(16)])
    return quantized.eval()


@pytest.mark.parametrize("zero_point", ["fixed", "learned"])
@pytest.mark.parametrize(("weight_bits", "act_bits"), [(2, 2), (4, 4), (3, 8)])
def test_the_graph_alone_computes_the_integers_of_evaluation(weight_bits: int, act_bits: int, zero_point: str) -> None:
    model = calibrated(General, weight_bits=weight_bits, act_bits=act_bits, zero_point=zero_point)
    images = pixels(3, seed=2)
    expected, graph = model.integers(images), lower(model)
    found = evaluate(graph, images.numpy())
    assert set(found) == {*expected, "pixels"}
    for name, codes in expected.items():
        assert np.array_equal(found[name], codes), name
        assert graph.values[name].shape == codes.shape[1:], name
    assert min(len(np.unique(codes)) for codes in expected.values()) > 1, "no test if the network were dead"


def test_the_nodes_of_a_general_network() -> None:
    graph = lower(calibrated(General))
    validate_graph(graph)
    kinds = {node.name: node.kind for node in graph.nodes if isinstance(node, Elementwise)}
    assert sorted(kinds.values()) == ["hard_sigmoid", "leaky_relu", "mul", "mul", "mul", "sigmoid", "sigmoid"]
    (concat,) = [node for node in graph.nodes if isinstance(node, Concat)]
    signed, rectified = (graph.values[name].quantization for name in concat.inputs)
    assert signed is not None and rectified is not None
    assert (signed.scale, signed.zero_point) == (rectified.scale, rectified.zero_point)
    assert (signed.qmin, rectified.qmin) == (0, signed.zero_point)


def test_islands_and_the_linear_layers_between_them() -> None:
    model = calibrated(Attention)
    graph = lower(model)
    validate_graph(graph)
    islands = [node for node in graph.nodes if isinstance(node, FloatIsland)]
    assert [node.name for node in islands] == list(model.islands())
    for node in islands:
        unit = model.islands()[node.name]
        assert (node.operators, node.reason) == (unit.operators, unit.reason)
        assert len(node.graph.input) == len(node.inputs) and len(node.graph.output) == len(node.outputs)
    gemms = {node.name: graph.values[node.output].quantization for node in graph.nodes if isinstance(node, Gemm)}
    assert gemms == dict.fromkeys(["qkv", "out", "fc"]), "products are handed on unrounded"

    images = pixels(3, seed=2)
    expected = model.integers(images)
    resynchronised = {node.output for node in graph.nodes if isinstance(node, Quantize)}
    assert resynchronised
    found = evaluate(graph, images.numpy(), {name: expected[name] for name in resynchronised})
    for name in found.keys() - {"pixels"}:
        assert np.array_equal(found[name], expected[name]), name


@pytest.mark.parametrize("batch", [1, 5])
def test_onnxruntime_takes_any_number_of_images(batch: int) -> None:
    import onnxruntime

    model, images = calibrated(General), pixels(batch, seed=4)
    data = expose_units(export_model(lower(model), ExportConfig(), {}))
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {session.get_inputs()[0].name: images.numpy()}), strict=True))
    expected = model.integers(images)
    assert found.keys() == expected.keys()
    assert {name: int((found[name] != codes).sum()) for name, codes in expected.items()} == dict.fromkeys(expected, 0)
