"""lower: the graph holds the very integers that evaluation uses, and onnxruntime computes the same from the file."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from integer_witness import evaluate
from onnx_sessions import expose_units
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.export.capture import lower
from mecdeploy.export.compiler import export_model
from mecdeploy.export.config import ExportConfig
from mecdeploy.export.errors import ExportError
from mecdeploy.export.graph import Add, Conv, Flatten, Gemm, GlobalAveragePool, MaxPool, Quantization, inputs_of
from mecdeploy.export.graph import outputs_of as written_by
from mecdeploy.export.validation import validate_graph
from mecdeploy.training.calibration import calibrate
from mecdeploy.training.config import QuantConfig
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.preparation import prepare
from mecdeploy.training.quantizers import QTensor
from mecdeploy.training.units import Unit, WeightedUnit

SPEC = InputSpec.from_statistics(channels=3, height=12, width=10, mean=120.7, std=64.1)


def convolution(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """Max pool, a sum read at two precisions, a strided block with a projection, a dilated convolution, two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(3, 8, 3)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.a1, self.a2, self.b = convolution(8, 8, 3), convolution(8, 8, 3), convolution(8, 8, 3)
        self.c1, self.c2 = convolution(8, 12, 3, stride=2), convolution(12, 12, 3)
        self.shortcut = convolution(8, 12, 1, stride=2)
        self.dilated = nn.Conv2d(12, 12, (3, 2), padding=(2, 1), dilation=2)
        self.hidden = nn.Linear(12, 9)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 12, 10] to [N, 5]."""
        x = self.pool(F.relu(self.stem(x)))
        x = F.relu(self.a2(F.relu(self.a1(x))) + x)
        x = F.relu(self.b(x) + x)
        x = F.relu(self.c2(F.relu(self.c1(x))) + self.shortcut(x))
        x = self.dilated(x)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        logits: Tensor = self.fc(self.dropout(F.relu(self.hidden(x))))
        return logits


def inverted(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    wide = 2 * inputs
    expand, depthwise = convolution(inputs, wide, 1), convolution(wide, wide, 3, stride=stride, groups=wide)
    return nn.Sequential(expand, nn.ReLU6(), depthwise, nn.ReLU6(), convolution(wide, outputs, 1))


class Depthwise(nn.Module):
    """Inverted residuals: ReLU6, depthwise kernels, signed bottlenecks, and signed sums of which one is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(3, 8, 3)
        self.a, self.b, self.c, self.d = inverted(8, 8, 1), inverted(8, 8, 1), inverted(8, 12, 2), inverted(12, 12, 1)
        self.head = convolution(12, 16, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.1), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 12, 10] to [N, 5]."""
        x = F.relu6(self.stem(x))
        x = self.a(x) + x
        x = self.c(self.b(x) + x)
        x = self.pool(F.relu6(self.head(self.d(x) + x)))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {"residual": Residual, "depthwise": Depthwise}


def pixels(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 12, 10), dtype=torch.uint8, generator=generator)


def calibrated(network: str, *, weight_bits: int = 4, act_bits: int = 4) -> QuantizedModel:
    """Random weights; BatchNorms with gammas of both signs and a dead channel, statistics away from 0 and 1."""
    torch.manual_seed(weight_bits + 10 * act_bits)
    model = NETWORKS[network]()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        assert norm.running_mean is not None and norm.running_var is not None
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias, 0.0, 0.5)
        nn.init.normal_(norm.running_mean, 0.0, 0.3)
        nn.init.uniform_(norm.running_var, 0.1, 2.0)
        with torch.no_grad():
            norm.weight[0], norm.running_var[1] = 0.0, 1e-12
    quantized = prepare(model, QuantConfig(weight_bits=weight_bits, act_bits=act_bits), SPEC)
    calibrate(quantized, [pixels(16)])
    for unit in quantized.units().values():
        if isinstance(unit, WeightedUnit) and unit.weight_quantizer.bits == 8:
            with torch.no_grad():  # 8-bit weights in -64..64: no CPU without VNNI saturates a pair of products
                unit.weight_quantizer.step.mul_(unit.weight.abs().amax() / unit.weight_quantizer.step.min() / 64)
    return quantized


def run(data: bytes, images: np.ndarray) -> dict[str, np.ndarray]:
    """Every unit's integers, and the logits, from onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(expose_units(data), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {session.get_inputs()[0].name: images}), strict=True))


WIDTHS = [(2, 2), (3, 3), (4, 4), (8, 8), (2, 8), (8, 2), (4, 3)]


@pytest.mark.parametrize(("weight_bits", "act_bits"), WIDTHS)
@pytest.mark.parametrize("network", NETWORKS)
def test_onnxruntime_computes_the_integers_of_evaluation(network: str, weight_bits: int, act_bits: int) -> None:
    """The promise: from pixels to logits, 0 differences."""
    model = calibrated(network, weight_bits=weight_bits, act_bits=act_bits)
    images = pixels(8, seed=1)
    expected = model.integers(images)
    for target in ("onnxruntime", "portable"):
        found = run(export_model(lower(model), ExportConfig(target=target), {}), images.numpy())
        assert set(found) == set(expected)
        different = {name: int((found[name] != codes).sum()) for name, codes in expected.items()}
        assert not any(different.values()), different
    # no test if the network were dead
    used = [len(np.unique(codes)) for codes in expected.values()]
    assert len(used) > 10 and min(used) > 1 and sorted(used)[len(used) // 2] >= 2**act_bits // 8 + 2


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("weight_bits", "act_bits"), [(2, 2), (4, 4), (3, 8)])
def test_the_graph_alone_computes_the_integers_of_evaluation(network: str, weight_bits: int, act_bits: int) -> None:
    """The witness reads the graph only: codes, scales, biases and wiring are all that evaluation uses."""
    model = calibrated(network, weight_bits=weight_bits, act_bits=act_bits)
    images = pixels(4, seed=2)
    expected, graph = model.integers(images), lower(model)
    found = evaluate(graph, images.numpy())
    assert set(found) == {*expected, "pixels"}
    for name, codes in expected.items():
        assert np.array_equal(found[name], codes), name
        assert graph.values[name].shape == codes.shape[1:], name


def test_the_nodes_of_the_residual_network() -> None:
    graph = lower(calibrated("residual"), "name")
    validate_graph(graph)
    assert (graph.name, graph.input, graph.output) == ("name", "pixels", "logits")
    rows = [(type(node), node.name, inputs_of(node), written_by(node)) for node in graph.nodes]
    assert rows == [
        (Conv, "stem.0", ("pixels",), ("stem.0",)),
        (MaxPool, "pool", ("stem.0",), ("pool",)),
        (Conv, "a1.0", ("pool",), ("a1.0",)),
        (Conv, "a2.0", ("a1.0",), ("a2.0",)),
        (Add, "add", ("a2.0", "pool"), ("add/act", "add/skip")),
        (Conv, "b.0", ("add/act",), ("b.0",)),
        (Add, "add_2", ("b.0", "add/skip"), ("add_2",)),
        (Conv, "c1.0", ("add_2",), ("c1.0",)),
        (Conv, "c2.0", ("c1.0",), ("c2.0",)),
        (Conv, "shortcut.0", ("add_2",), ("shortcut.0",)),
        (Add, "add_3", ("c2.0", "shortcut.0"), ("add_3",)),
        (Conv, "dilated", ("add_3",), ("dilated",)),
        (GlobalAveragePool, "adaptive_avg_pool2d", ("dilated",), ("adaptive_avg_pool2d",)),
        (Flatten, "flatten", ("adaptive_avg_pool2d",), ("flatten",)),
        (Gemm, "hidden", ("flatten",), ("hidden",)),
        (Gemm, "fc", ("hidden",), ("logits",)),  # the dropout between them is gone
    ]
    assert set(graph.values) == {"pixels", *(name for row in rows for name in row[3])}
    nodes = {node.name: node for node in graph.nodes}
    pool, strided, dilated = nodes["pool"], nodes["c1.0"], nodes["dilated"]
    assert isinstance(pool, MaxPool) and isinstance(strided, Conv) and isinstance(dilated, Conv)
    assert (pool.kernel, pool.stride, pool.padding, pool.ceil_mode) == ((3, 3), (2, 2), (1, 1, 1, 1), True)
    assert (strided.stride, strided.padding, strided.groups) == ((2, 2), (1, 1, 1, 1), 1)
    assert (dilated.weight.codes.shape, dilated.padding, dilated.dilation) == ((12, 12, 3, 2), (2, 1, 2, 1), (2, 2))


def test_quantisations_are_the_steps_in_use() -> None:
    model = calibrated("depthwise", act_bits=3)
    stem = model.unit("stem.0").output
    assert stem is not None
    with torch.no_grad():
        stem.step.fill_(40.0)  # ReLU6 holds the step at 6 / 255, for a sum reads the stem at 8 bits
    values = lower(model).values
    assert values["pixels"].quantization == Quantization(scale=SPEC.pixel_scale, zero_point=121, qmax=255)
    assert values["stem.0"].quantization == Quantization(scale=float(np.float32(6 / 255)), zero_point=0, qmax=255)
    for name, index, zero_point, qmax in (("add/act", 0, 4, 7), ("add/skip", 1, 128, 255)):
        step = model.unit("add").outputs[index].step  # type: ignore[union-attr]
        expected = Quantization(scale=step.item(), zero_point=zero_point, qmax=qmax)  # type: ignore[operator]
        assert values[name].quantization == expected
    assert values["logits"].quantization is None
    assert values["flatten"].quantization == values["pool"].quantization


@pytest.mark.parametrize("weight_bits", [2, 3, 4, 8])
def test_weights_fill_their_width(weight_bits: int) -> None:
    model = calibrated("depthwise", weight_bits=weight_bits)
    for node in lower(model).nodes:
        if not isinstance(node, Conv | Gemm):
            continue
        unit = model.unit(node.name)
        assert isinstance(unit, WeightedUnit)
        bits = 8 if node.name in ("stem.0", "classifier.2") else weight_bits
        step = unit.weight_quantizer.step.detach().view(-1, *[1] * (unit.weight.dim() - 1))
        codes = np.rint((unit.weight.detach() / step).numpy()).clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert (node.weight.bits, node.weight.codes.dtype, node.bias.dtype) == (bits, np.int8, np.int32)
        assert np.array_equal(node.weight.codes, codes)
        assert (node.weight.scale > 0).all() and node.weight.scale.dtype == np.float32


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_lowering_changes_nothing(training: bool, frozen: bool) -> None:
    model = calibrated("residual").train(training)
    if frozen:
        model.freeze()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = pixels(2)
    found = evaluate(lower(model), images.numpy())
    assert model.training == training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert np.array_equal(found["logits"], model.integers(images)["logits"])


@pytest.mark.parametrize(
    ("parameter", "what"),
    [
        ("b.0.weight_quantizer.step", "weights"),
        ("b.0.weight", "weights"),
        ("b.0.batch_norm.weight", "weight scales"),
        ("b.0.batch_norm.bias", "weight scales"),  # they leave room for the bias
    ],
)
def test_numbers_that_are_not_finite_are_refused(parameter: str, what: str) -> None:
    model = calibrated("residual")
    with torch.no_grad():
        model.get_parameter(f"body.{parameter}").fill_(float("nan"))
    with pytest.raises(ExportError, match=f"b.0: its {what} are not finite; train again with a lower learning rate."):
        lower(model)


def test_a_unit_without_a_node_is_refused() -> None:
    class Strange(Unit):
        def forward(self, x: QTensor) -> QTensor:
            return x.with_codes(x.codes.flatten(1))

    model = calibrated("residual")
    model.body.flatten = Strange([], ("flatten",))
    with pytest.raises(ExportError, match="flatten: Strange has no integer node; add one to export/graph.py"):
        lower(model)
