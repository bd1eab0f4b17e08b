"""Every pair of bit widths, trained for a moment, exported, and the same in onnxruntime to the last integer."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from depthwise_net import small_depthwise_net, train_float, train_quantized
from quantized_runs import quantized_config
from torch import Tensor, nn

from mecdeploy import DataConfig, QuantConfig, api
from mecdeploy.export import ExportConfig, export_model, lower
from mecdeploy.reference import TorchReference
from mecdeploy.runtime_checks import ParityReport, check_model
from mecdeploy.training.data import load_dataset
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.run import load_run

MATRIX = list(product((2, 3, 4, 8), (2, 4, 8)))
# Each width meets both targets and both inputs somewhere in its row.
TARGETS = {pair: ("onnxruntime", "portable")[index % 2] for index, pair in enumerate(MATRIX)}
INPUTS = {pair: ("uint8", "uint8", "float")[index % 3] for index, pair in enumerate(MATRIX)}


def assert_exact(report: ParityReport, weight_bits: int) -> None:
    assert report.passed, report.failures
    assert report.integers_different == 0 and report.logits_different == 0
    assert report.max_logit_difference == 0.0 and report.top1_agreement == 1.0
    assert report.accuracy_torch == report.accuracy_onnxruntime
    assert report.float_convolutions == 0
    assert set(report.packed_bits.values()) == {weight_bits, 8}
    assert report.integers_compared > 100_000


def assert_alive(reference: TorchReference, pixels: np.ndarray, qmax: int) -> None:
    """A network whose layers are constant would agree with anything: each takes two values, one takes many."""
    values = {name: len(np.unique(codes)) for name, codes in reference.integers(pixels).items() if name != "logits"}
    assert min(values.values()) >= 2, values
    assert max(values.values()) >= min(qmax + 1, 64), values


@pytest.mark.parametrize(("weight_bits", "act_bits"), MATRIX, ids=lambda bits: str(bits))
def test_residual(resnet8: Path, tmp_path: Path, weight_bits: int, act_bits: int) -> None:
    pair = (weight_bits, act_bits)
    config = quantized_config(resnet8, weight_bits, act_bits, method="mec" if act_bits == 4 else "lsq")
    api.train(config, tmp_path / "run")
    exported = api.export(tmp_path / "run", target=TARGETS[pair], input=INPUTS[pair])
    report = api.check(tmp_path / "run")
    assert_exact(report, weight_bits)
    assert set(exported.activation_bits.values()) == {act_bits, 8}
    pixels = next(iter(load_dataset(config.data, seed=0).validation.batches(64))).images[0].numpy()
    assert_alive(TorchReference(load_run(tmp_path / "run").model), pixels, 2**act_bits - 1)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pixels and labels, validation pixels and labels."""
    data = load_dataset(DataConfig(name="digits"), seed=0)
    train = next(iter(data.train.batches(len(data.train))))
    validation = next(iter(data.validation.batches(len(data.validation))))
    return train.images[0], train.labels, validation.images[0], validation.labels


@pytest.fixture(scope="module")
def depthwise(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[nn.Module, InputSpec]:
    pixels, labels, _, _ = digits
    values = pixels.double()
    spec = InputSpec.from_statistics(channels=1, height=8, width=8, mean=float(values.mean()), std=float(values.std()))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return train_float(small_depthwise_net(10), spec, pixels[order], labels[order]), spec


@pytest.mark.parametrize(("weight_bits", "act_bits"), MATRIX, ids=lambda bits: str(bits))
def test_depthwise(
    depthwise: tuple[nn.Module, InputSpec],
    digits: tuple[Tensor, Tensor, Tensor, Tensor],
    tmp_path: Path,
    weight_bits: int,
    act_bits: int,
) -> None:
    pixels, labels, validation, validation_labels = digits
    model, spec = depthwise
    quant = QuantConfig(weight_bits=weight_bits, act_bits=act_bits)
    quantized = train_quantized(model, quant, spec, pixels, labels)
    # The other target than the residual net's, so that every pair of widths meets both.
    target = "portable" if TARGETS[weight_bits, act_bits] == "onnxruntime" else "onnxruntime"
    path = tmp_path / "model.onnx"
    path.write_bytes(export_model(lower(quantized), ExportConfig(target=target), {}))
    reference = TorchReference(quantized)
    report = check_model(path, validation.numpy(), validation_labels.numpy(), reference)
    assert_exact(report, weight_bits)
    assert_alive(reference, validation[:64].numpy(), 2**act_bits - 1)


def test_the_matrix_is_whole() -> None:
    assert len(MATRIX) == 12
    for bits in (2, 3, 4, 8):
        assert {TARGETS[pair] for pair in MATRIX if pair[0] == bits} == {"onnxruntime", "portable"}
    for bits in (2, 4, 8):
        assert {TARGETS[pair] for pair in MATRIX if pair[1] == bits} == {"onnxruntime", "portable"}
    assert set(INPUTS.values()) == {"uint8", "float"}
