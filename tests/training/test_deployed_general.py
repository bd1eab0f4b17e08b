"""Products, gates, slopes and windowed means against the numpy witness: every code, many scales, both zero points."""

from __future__ import annotations

import kernel_witness as witness
import numpy as np
import pytest
import torch

from mecdeploy.training import deployed
from mecdeploy.training.geometry import Geometry, sides
from mecdeploy.training.quantizers import ActivationQuantizer, QTensor

F32 = np.float32
EVERY_CODE = np.arange(256, dtype=np.uint8)[None]

OUTPUTS = {
    # bits, signed, learned zero point, rectified
    "unsigned 8": (8, False, None, False),
    "unsigned 2": (2, False, None, False),
    "signed 8": (8, True, None, False),
    "signed 4": (4, True, None, False),
    "learned 8": (8, True, 37, False),
    "learned 3": (3, True, 1, False),
    "rectified": (8, True, 90, True),
}


def quantizer(kind: str, step: float) -> ActivationQuantizer:
    bits, signed, zero, rectified = OUTPUTS[kind]
    output = ActivationQuantizer(bits, signed=signed, rectified=rectified, learn_zero_point=zero is not None)
    with torch.no_grad():
        output.step.fill_(step)
        if zero is not None:
            assert output.offset is not None
            output.offset.copy_((zero + 0.3) * output.step)  # learned between the codes
    assert output.zero_point == (2 ** (bits - 1) if signed else 0) if zero is None else zero
    assert output.qmin == (output.zero_point if rectified else 0)
    return output


def tensor(stored: np.ndarray, zero_point: int, scale: float) -> QTensor:
    return QTensor(torch.from_numpy(stored.astype(F32)) - zero_point, torch.tensor(scale), zero_point, 255)


def ends_of(output: ActivationQuantizer) -> tuple[int, int, int]:
    return output.zero_point, output.qmin, output.qmax


def scales(count: int) -> np.ndarray:
    """Irregular ones, powers of two and simple ratios, which are full of ties."""
    irregular = np.exp(np.random.default_rng(0).uniform(-7, 1, count)).astype(F32)
    return np.concatenate([irregular, np.array([0.5, 2.0**-6, 0.1, 0.3, 1 / 3], F32)])


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("zeros", [(0, 0), (128, 0), (91, 200)])
def test_multiply(kind: str, zeros: tuple[int, int]) -> None:
    """All 65,536 pairs."""
    a, b = (grid.reshape(1, -1) for grid in np.meshgrid(EVERY_CODE[0], EVERY_CODE[0]))
    steps = scales(6)
    for a_scale, b_scale, step in zip(steps, np.roll(steps, 1), np.roll(steps, 2), strict=True):
        output = quantizer(kind, float(step))
        result = deployed.multiply(tensor(a, zeros[0], float(a_scale)), tensor(b, zeros[1], float(b_scale)), output)
        expected = witness.multiply(
            a, a_scale, zeros[0], b, b_scale, zeros[1], step, *ends_of(output)
        )  # fmt: skip
        assert np.array_equal(result.stored().numpy(), expected)
        assert (result.zero_point, result.qmin, result.qmax) == ends_of(output)


def test_multiply_adds_the_zero_point_before_rounding() -> None:
    """At a tie the parity of the sum decides: 0.5 + 1 is 2, where rint(0.5) + 1 is 1."""
    a = np.array([[1, 3, 5, 7]], np.uint8)
    output = quantizer("learned 3", 2.0)
    result = deployed.multiply(tensor(a, 0, 1.0), tensor(np.ones_like(a), 0, 1.0), output)
    assert result.stored().tolist() == [[2, 2, 4, 4]]  # 1.5, 2.5, 3.5, 4.5
    after = np.rint(a / 2) + 1
    assert after.tolist() == [[1, 3, 3, 5]]


def test_multiply_broadcasts_a_gate() -> None:
    rng = np.random.default_rng(0)
    image, gate = rng.integers(0, 256, (2, 3, 4, 5)), rng.integers(0, 256, (2, 3, 1, 1))
    output = quantizer("signed 8", 0.7)
    result = deployed.multiply(tensor(image, 128, 0.031), tensor(gate, 0, 0.004), output)
    wide = np.broadcast_to(gate, image.shape)
    expected = witness.multiply(image, 0.031, 128, wide, 0.004, 0, 0.7, *ends_of(output))
    assert np.array_equal(result.stored().numpy(), expected)


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("zero_point", [0, 128, 77])
def test_sigmoid(kind: str, zero_point: int) -> None:
    for scale in scales(3):
        output = quantizer(kind, 1.0 / 2 ** OUTPUTS[kind][0])
        result = deployed.sigmoid(tensor(EVERY_CODE, zero_point, float(scale)), output)
        expected = witness.through_table(
            EVERY_CODE, scale, zero_point, witness.logistic, output.step.item(), *ends_of(output)
        )
        assert np.array_equal(result.stored().numpy(), expected)


def test_the_logistic_of_the_kernel_is_near_the_true_one() -> None:
    """Within 2 units of the last place at 1: what the gradients of the true function stand for."""
    x = np.linspace(-20, 20, 400).astype(F32)
    kernel = np.array([witness.logistic(value) for value in x])
    true = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert np.abs(kernel - true).max() <= 2 * 2.0**-23
    assert kernel.min() >= 0


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.1, 0.25, 0.3, 0.0123])
@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("zero_point", [0, 128, 200])
def test_leaky_relu(alpha: float, kind: str, zero_point: int) -> None:
    for scale, step in zip(scales(3), np.roll(scales(3), 1), strict=True):
        output = quantizer(kind, float(step))
        result = deployed.leaky_relu(tensor(EVERY_CODE, zero_point, float(scale)), output, alpha)
        expected = witness.through_table(
            EVERY_CODE, scale, zero_point, lambda x: witness.leaky(x, alpha), step, *ends_of(output)
        )
        assert np.array_equal(result.stored().numpy(), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", [0, 128, 77])
@torch.no_grad()
def test_hard_sigmoid(bits: int, zero_point: int) -> None:
    """The largest step allowed, 1 / qmax, a power of two, and one in between; x from far below -3 to far above 3."""
    qmax = 2**bits - 1
    for scale in scales(2):
        for step in (1 / qmax, 2.0**-bits, 0.77 / qmax):
            output = ActivationQuantizer(bits, signed=False, maximum=1.0)
            with torch.no_grad():
                output.step.fill_(step)
            result = deployed.hard_sigmoid(tensor(EVERY_CODE, zero_point, float(scale)), output)
            expected = witness.hard_sigmoid(EVERY_CODE, scale, zero_point, output.effective_step().item(), qmax)
            assert np.array_equal(result.stored().numpy(), expected)
            real = np.clip((EVERY_CODE.astype(float) - zero_point) * float(scale) / 6 + 0.5, 0, qmax * step)
            # half a step of rounding, and float32's on the way to the code
            assert np.abs(result.codes.detach().numpy() * step - np.clip(real, 0, 1)).max() <= 0.5001 * step


WINDOWS = {
    # kernel, stride, padding
    "2 x 2": ((2, 2), (2, 2), (0, 0)),
    "3 x 3 padded": ((3, 3), (1, 1), (1, 1)),
    "uneven": ((3, 2), (2, 1), (1, 0)),
    "whole image padded": ((6, 5), (1, 1), (1, 2)),
    "one place": ((1, 1), (2, 2), (0, 0)),
}


@pytest.mark.parametrize("include_pad", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("kind", "zero_point"), [("unsigned 8", 0), ("signed 4", 128), ("learned 8", 50)])
def test_average(window: str, include_pad: bool, kind: str, zero_point: int) -> None:
    kernel, stride, padding = WINDOWS[window]
    rng = np.random.default_rng(len(window))
    stored = rng.integers(0, 256, (2, 3, 6, 5))
    stored[0, 0], stored[0, 1], stored[0, 2] = 255, 0, zero_point
    for scale, step in ((0.037, 0.051), (0.25, 0.5), (0.25, 0.125), (1 / 3, 0.1)):
        output = quantizer(kind, step)
        geometry = Geometry(stride=stride, padding=sides(padding))
        result = deployed.average(tensor(stored, zero_point, scale), kernel, geometry, include_pad, output)
        expected = witness.average_pool(
            stored, scale, zero_point, kernel, stride, padding, include_pad, step, *ends_of(output)
        )
        assert np.array_equal(result.stored().numpy(), expected)


def test_average_sums_in_the_order_of_rows() -> None:
    """Float32 sums depend on their order: columns first would give other codes at a fine output step."""
    rng = np.random.default_rng(3)
    stored = rng.integers(0, 256, (1, 400, 3, 3))
    scale, step = 0.1, 0.2 / 9  # a mean is a multiple of half a step: every second one is near a tie
    output = quantizer("unsigned 8", step)
    geometry = Geometry(stride=(1, 1), padding=sides(1))
    result = deployed.average(tensor(stored, 0, scale), (3, 3), geometry, True, output).stored().numpy()
    by_rows = witness.average_pool(stored, scale, 0, (3, 3), (1, 1), (1, 1), True, step, *ends_of(output))
    turned = stored.transpose(0, 1, 3, 2)
    by_columns = witness.average_pool(turned, scale, 0, (3, 3), (1, 1), (1, 1), True, step, *ends_of(output))
    assert np.array_equal(result, by_rows)
    assert (by_columns.transpose(0, 1, 3, 2) != by_rows).any(), "these values would not tell the orders apart"


@pytest.mark.parametrize("kind", ["learned 8", "learned 3", "rectified"])
def test_the_older_kernels_at_learned_zero_points(kind: str) -> None:
    rng = np.random.default_rng(5)
    step = 0.9
    output = quantizer(kind, step)
    zero_point, qmin, qmax = ends_of(output)
    accumulator = rng.integers(-40_000, 40_000, (3, 4, 6, 6))
    weight_scale = np.array([0.01, 2.0**-8, 0.0007, 0.3], F32)
    product_scale = torch.tensor(0.5) * torch.from_numpy(weight_scale).view(-1, 1, 1)
    result = deployed.requantize(torch.from_numpy(accumulator).double(), product_scale, output)
    expected = witness.requantize(accumulator, 0.5, weight_scale, step, zero_point, qmax)
    assert np.array_equal(result.stored().numpy(), np.maximum(expected, qmin))

    a, b = rng.integers(0, 256, (2, 1, 900)).astype(np.uint8)
    added = deployed.add(tensor(a, 20, 0.11), tensor(b, 230, 0.07), [output])[0]
    expected = witness.add(a, 0.11, 20, b, 0.07, 230, step, zero_point, qmax)
    assert np.array_equal(added.stored().numpy(), np.maximum(expected, qmin))

    stored = rng.integers(0, 256, (2, 3, 4, 4))
    pooled = deployed.global_average(tensor(stored, 99, 0.2), output)
    expected = witness.global_average(stored, 0.2, 99, step, zero_point, qmax)
    assert np.array_equal(pooled.stored().numpy(), np.maximum(expected, qmin))
