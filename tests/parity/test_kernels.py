"""Every kernel in a small network, trained for a moment, exported: the same integers in onnxruntime."""

from __future__ import annotations

import functools
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_nets import CLASSES, KERNEL_NETS, SIZE
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy import QuantConfig
from mecdeploy.export import ExportConfig, export_model, lower
from mecdeploy.export.graph import Conv, Gemm
from mecdeploy.reference import TorchReference
from mecdeploy.runtime_checks import ParityReport, check_model
from mecdeploy.training.calibration import calibrate
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.preparation import prepare
from mecdeploy.training.quantizers import ActivationQuantizer

STEPS, BATCH = 6, 16
WIDTHS = (2, 4, 8)
PAIRS = [[(WIDTHS[i], WIDTHS[(i + shift) % 3]) for i in range(3)] for shift in range(3)]
"""Three rows of a Latin square: a row meets every width of weights and of activations once, all rows every pair."""
ISLANDS = ("transformer", "reused")
"""Networks that hold operators without an integer kernel."""

CASES = [(name, *pair) for index, name in enumerate(KERNEL_NETS) for pair in PAIRS[index % 3]]


def spec() -> InputSpec:
    """A normalisation for each channel."""
    mean, std = (125.3, 122.9, 113.8), (63.0, 62.1, 66.7)
    return InputSpec.from_channels(height=SIZE, width=SIZE, mean=mean, std=std)


def data(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise around a colour and a brightness for each class: uint8 [count, 3, 12, 12] and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    pixels = rng.integers(0, 110, (count, 3, SIZE, SIZE)) + rng.integers(0, 40, (count, 1, 1, SIZE))
    pixels[np.arange(count), labels % 3] += 30 + 20 * (labels // 3)[:, None, None]
    return torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels)


@functools.cache
def float_network(name: str) -> nn.Module:
    """Trained for a moment, its BatchNorms with the statistics of all images."""
    torch.manual_seed(0)
    pixels, labels = data(STEPS * BATCH)
    model, images = KERNEL_NETS[name]().train(), spec().normalize(pixels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        model(images)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 0.1
    return model


def trained(name: str, config: QuantConfig) -> QuantizedModel:
    """Calibrated, then a few steps: half with live BatchNorm, half with the deployed arithmetic."""
    pixels, labels = data(STEPS * BATCH)
    model = prepare(float_network(name), config, spec())
    torch.manual_seed(0)
    calibrate(model, [pixels])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0005, momentum=0.9)
    for step in range(STEPS):
        if step == STEPS // 2:
            model.freeze()
        batch = slice(step * BATCH, (step + 1) * BATCH)
        optimizer.zero_grad()
        F.cross_entropy(model.train()(pixels[batch]), labels[batch]).backward()
        optimizer.step()
    return model.eval()


def checked(model: QuantizedModel, target: str, path: Path) -> ParityReport:
    path.write_bytes(export_model(lower(model), ExportConfig(target=target), {}))
    pixels, labels = data(24, seed=1)
    reference = TorchReference(model)
    values = [codes for key, codes in reference.integers(pixels.numpy()).items() if key != "logits"]
    alive = [len(np.unique(codes)) for codes in values]
    # a network whose layers are constant would agree with anything
    assert min(alive) >= 2 and sorted(alive)[len(alive) // 2] >= 3, alive
    return check_model(path, pixels.numpy(), labels.numpy(), reference)


def assert_exact(report: ParityReport, name: str) -> None:
    assert report.passed, report.failures
    assert report.integers_different == 0 and report.integers_compared > 5_000
    assert report.float_convolutions == 0
    assert bool(report.float_islands) == (name in ISLANDS)
    if name not in ISLANDS:
        assert report.exact_end_to_end and report.logits_different == 0 and report.max_logit_difference == 0.0


@pytest.mark.parametrize(("name", "weight_bits", "act_bits"), CASES)
def test_every_kernel(name: str, weight_bits: int, act_bits: int, tmp_path: Path) -> None:
    target = "portable" if (weight_bits, act_bits) in PAIRS[1] else "onnxruntime"
    model = trained(name, QuantConfig(weight_bits=weight_bits, act_bits=act_bits, skip_bits=max(act_bits, 4)))
    assert_exact(checked(model, target, tmp_path / "model.onnx"), name)


@pytest.mark.parametrize("name", ["SE, sigmoid", "SE, hard sigmoid", "dense", "pooled", "shuffled", "transformer"])
def test_learned_zero_points(name: str, tmp_path: Path) -> None:
    model = trained(name, QuantConfig(zero_point="learned"))
    quantizers = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    learned = {module.zero_point for module in quantizers if module.offset is not None}
    assert learned - {0, 8, 128}, "some zero point has left the middle"
    assert_exact(checked(model, "onnxruntime", tmp_path / "model.onnx"), name)


def test_values_that_a_concat_joins_at_widths_of_their_own(tmp_path: Path) -> None:
    """Overrides and a skip stream of 4 bits: one scale side by side, qmin and qmax as each has them."""
    overrides = {"body.branch.*": {"weight_bits": 2, "act_bits": 2}, "body.after.0": {"weight_bits": 8}}
    model = trained("shuffled", QuantConfig(act_bits=4, skip_bits=4, zero_point="learned", overrides=overrides))
    report = checked(model, "portable", tmp_path / "model.onnx")
    assert_exact(report, "shuffled")
    assert {2, 4, 8} <= {*report.packed_bits.values(), 4}


GRIDS = [
    ("midrise", 1, "SE, sigmoid", "onnxruntime"),
    ("midrise", 2, "shuffled", "portable"),
    ("midrise", 3, "dense", "onnxruntime"),
    ("midrise", 4, "SE, sigmoid", "portable"),
    ("ternary", 2, "shuffled", "onnxruntime"),
    ("ternary", 2, "SE, sigmoid", "portable"),
    ("levels", 1, "shuffled", "portable"),
    ("levels", 2, "SE, sigmoid", "onnxruntime"),
    ("levels", 3, "shuffled", "onnxruntime"),
    ("levels", 4, "dense", "portable"),
    ("codebook", 2, "wide", "onnxruntime"),
    ("codebook", 2, "wide", "portable"),
]


@pytest.mark.parametrize(("grid", "bits", "name", "target"), GRIDS)
def test_every_weight_grid(grid: str, bits: int, name: str, target: str, tmp_path: Path) -> None:
    model = trained(name, QuantConfig(weight_bits=bits, act_bits=4, weight_grid=grid))
    weights = [node.weight for node in lower(model).nodes if isinstance(node, Conv | Gemm)]
    assert sum(weight.levels is not None for weight in weights) >= 2
    report = checked(model, target, tmp_path / "model.onnx")
    assert_exact(report, name)
    assert set(report.packed_bits.values()) == {bits, 8}


@pytest.mark.parametrize("target", ["onnxruntime", "portable"])
def test_one_bit_of_weights_and_of_activations(target: str, tmp_path: Path) -> None:
    model = trained("SE, sigmoid", QuantConfig(weight_bits=1, act_bits=1))
    assert {output.bits for unit in model.units().values() for output in unit.outputs} == {
        1,
        2,
        8,
    }  # the excitation's input to the sigmoid
    report = checked(model, target, tmp_path / "model.onnx")
    assert_exact(report, "SE, sigmoid")
    assert set(report.packed_bits.values()) == {1, 8}


def test_every_pair_of_widths_is_met() -> None:
    assert {(w, a) for _, w, a in CASES} == set(product(WIDTHS, WIDTHS))
    for name in KERNEL_NETS:
        assert {w for case, w, _ in CASES if case == name} == {a for case, _, a in CASES if case == name} == set(WIDTHS)
