"""The deployed arithmetic against the numpy witness: equal codes, not close ones."""

from __future__ import annotations

from contextlib import nullcontext

import kernel_witness as witness
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mecdeploy.training import deployed
from mecdeploy.training.geometry import Geometry
from mecdeploy.training.quantizers import ActivationQuantizer, QTensor

F32 = np.float32


def quantizer(bits: int, *, signed: bool, step: float) -> ActivationQuantizer:
    output = ActivationQuantizer(bits, signed=signed)
    with torch.no_grad():
        output.step.fill_(step)
    return output


def centred(stored: np.ndarray, zero_point: int, scale: float, qmax: int = 255) -> QTensor:
    return QTensor(torch.from_numpy(stored.astype(F32)) - zero_point, torch.tensor(scale), zero_point, qmax)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_requantize(bits: int, signed: bool) -> None:
    rng = np.random.default_rng(bits + 10 * signed)
    accumulator = rng.integers(-60_000, 60_000, (3, 5, 20, 20))
    accumulator[:, 0] = np.linspace(-60_000, 60_000, 1200).reshape(3, 20, 20)  # reaches every code
    accumulator[:, 1] = 4096 * rng.integers(-9, 9, (3, 20, 20)) + 2048  # M is 2^-12: ties only
    # channel 4 saturates both ways
    input_scale, step = 0.5, 2.0
    weight_scale = np.array([0.0173, 2.0**-10, 0.00031, 0.0009, 3.7], F32)
    output = quantizer(bits, signed=signed, step=step)

    product_scale = torch.tensor(input_scale) * torch.from_numpy(weight_scale).view(-1, 1, 1)
    result = deployed.requantize(torch.from_numpy(accumulator).double(), product_scale, output)

    expected = witness.requantize(accumulator, input_scale, weight_scale, step, output.zero_point, output.qmax)
    assert np.array_equal(result.stored().numpy(), expected)
    assert len(np.unique(expected)) == 2**bits, "the case should reach every code"


def test_requantize_multiplies_in_the_kernels_order() -> None:
    """f32(f32(s_x * s_w) / s_y) and not f32(s_x * f32(s_w / s_y)): the two part near ties."""
    rng = np.random.default_rng(0)
    input_scale, step = 0.0117, 0.0931
    weight_scale = rng.uniform(0.001, 0.01, 4000).astype(F32)
    multiplier = (F32(input_scale) * weight_scale) / F32(step)
    accumulator = np.rint((rng.integers(0, 255, 4000) + 0.5) / multiplier).astype(np.int64)[None]
    accumulator += rng.integers(-1, 2, 4000)
    other_order = np.rint(accumulator[0].astype(F32) * (F32(input_scale) * (weight_scale / F32(step))))

    result = deployed.requantize(
        torch.from_numpy(accumulator).double(),
        torch.tensor(input_scale) * torch.from_numpy(weight_scale),
        quantizer(8, signed=False, step=step),
    )

    expected = witness.requantize(accumulator, input_scale, weight_scale, step, 0, 255)
    assert np.array_equal(result.stored().numpy(), expected)
    assert (np.clip(other_order, 0, 255) != expected[0]).any(), "these values would not tell the orders apart"


def test_requantize_rounds_a_long_accumulator_once() -> None:
    """int32 to float32, half to even: 2^24 + 1 becomes 2^24, 2^24 + 3 becomes 2^24 + 4."""
    accumulator = np.array([[2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**30 + 65]])
    scale = np.full(4, 2.0**-20, F32)
    result = deployed.requantize(
        torch.from_numpy(accumulator).double(), torch.from_numpy(scale), quantizer(8, signed=True, step=2.0**-17)
    )
    assert np.array_equal(result.stored().numpy(), witness.requantize(accumulator, 1.0, scale, 2.0**-17, 128, 255))


ADD_CASES = [
    # scales of a, b and y; zero points of a and b
    (0.0371, 0.0213, 0.0419, 0, 0),
    (0.0371, 0.0213, 0.0419, 128, 128),
    (0.0371, 0.0213, 0.0419, 0, 128),
    (0.25, 0.5, 1.0, 0, 128),  # simple ratios: full of exact ties
    (0.1, 0.3, 0.2, 128, 0),
    (0.07, 0.07, 0.14, 0, 0),
    (1e-6, 3.0, 0.9, 128, 128),  # one side dead
]


@pytest.mark.parametrize("case", ADD_CASES)
@pytest.mark.parametrize(("bits", "signed"), [(2, False), (4, True), (8, False), (8, True)])
def test_add(case: tuple[float, float, float, int, int], bits: int, signed: bool) -> None:
    a_scale, b_scale, scale, a_zero, b_zero = case
    rng = np.random.default_rng(bits)
    a, b = rng.integers(0, 256, (2, 1, 1200)).astype(np.uint8)
    output = quantizer(bits, signed=signed, step=scale)

    result = deployed.add(centred(a, a_zero, a_scale), centred(b, b_zero, b_scale), [output])[0]

    expected = witness.add(a, a_scale, a_zero, b, b_scale, b_zero, scale, output.zero_point, output.qmax)
    assert np.array_equal(result.stored().numpy(), expected)
    assert (result.zero_point, result.qmax) == (output.zero_point, output.qmax)


def many_pairs() -> tuple[np.ndarray, np.ndarray]:
    a, b = np.random.default_rng(0).integers(0, 256, (2, 1, 3500)).astype(np.uint8)
    return a, b


def test_add_takes_b_first() -> None:
    """fma(a, ra, fma(b, rb, zc)): the other way round gives other codes at scales in simple ratios."""
    a, b = many_pairs()
    result = deployed.add(centred(a, 0, 0.35), centred(b, 0, 0.4), [quantizer(8, signed=False, step=0.6)])[0]
    assert np.array_equal(result.stored().numpy(), witness.add(a, 0.35, 0, b, 0.4, 0, 0.6, 0, 255))
    reversed_order = witness.add(b, 0.4, 0, a, 0.35, 0, 0.6, 0, 255)
    assert (reversed_order != result.stored().numpy()).any(), "these values would not tell the orders apart"


def test_add_fuses_its_constant() -> None:
    """zc = zy - fma(ra, za, rb * zb): rounded twice it differs where zero points are odd, as those of pixels are."""
    a, b = many_pairs()
    a_scale, a_zero, b_scale, b_zero, step = 0.0625, 121, 0.109375, 153, 0.09375
    output = quantizer(8, signed=True, step=step)
    result = deployed.add(centred(a, a_zero, a_scale), centred(b, b_zero, b_scale), [output])[0].stored().numpy()
    assert np.array_equal(result, witness.add(a, a_scale, a_zero, b, b_scale, b_zero, step, 128, 255))

    ratio_a, ratio_b = F32(a_scale) / F32(step), F32(b_scale) / F32(step)
    constant = F32(128) - (ratio_a * F32(a_zero) + ratio_b * F32(b_zero))
    sums = [
        witness.fused_multiply_add(x, ratio_a, witness.fused_multiply_add(y, ratio_b, constant))
        for x, y in zip(a[0].tolist(), b[0].tolist(), strict=True)
    ]
    rounded_twice = np.clip(np.rint(np.array(sums)), 0, 255)
    assert (rounded_twice != result[0]).any(), "these values would not tell the two apart"


def test_add_is_not_dequantise_add_quantise() -> None:
    a, b = (grid.ravel()[None].astype(np.uint8) for grid in np.meshgrid(np.arange(64), np.arange(64)))
    naive = np.clip(np.rint((a * F32(0.1) + b * F32(0.3)) / F32(0.2)), 0, 255).astype(np.uint8)

    result = deployed.add(centred(a, 0, 0.1), centred(b, 0, 0.3), [quantizer(8, signed=False, step=0.2)])[0]

    expected = witness.add(a, 0.1, 0, b, 0.3, 0, 0.2, 0, 255)
    assert np.array_equal(result.stored().numpy(), expected)
    assert (naive != expected).any(), "these values would not tell the two apart"


def test_global_average_multiplies_scale_and_count_first() -> None:
    """sx / (sy * n): divided one after the other, these ties fall the other way."""
    sums = np.array([1359, 1395, 1431, 1467, 1503])
    stored = np.stack([np.array([255] * 5 + [int(total) - 5 * 255]).reshape(2, 3) for total in sums])[None]
    result = deployed.global_average(centred(stored, 0, 0.1), quantizer(8, signed=False, step=0.3))
    expected = witness.global_average(stored, 0.1, 0, 0.3, 0, 255)
    assert np.array_equal(result.stored().numpy(), expected)
    other_order = np.rint(sums.astype(F32) * (F32(0.1) / F32(0.3) / F32(6)))
    assert (other_order != expected.ravel()).any(), "these values would not tell the orders apart"


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (4, 6), (301, 300)])
@pytest.mark.parametrize(("zero_point", "bits", "signed"), [(0, 8, False), (128, 8, True), (8, 4, True), (0, 2, False)])
def test_global_average(size: tuple[int, int], zero_point: int, bits: int, signed: bool) -> None:
    """(301, 300) at code 255 sums beyond 2^24, where float32 has no odd integers."""
    rng = np.random.default_rng(size[0])
    stored = rng.integers(0, 256, (2, 9, *size))
    stored[0, 0], stored[0, 1], stored[0, 2] = 255, 0, zero_point
    output = quantizer(bits, signed=signed, step=0.11)

    result = deployed.global_average(centred(stored, zero_point, 0.037), output)

    expected = witness.global_average(stored, 0.037, zero_point, 0.11, output.zero_point, output.qmax)
    assert result.codes.shape == (2, 9, 1, 1)
    assert np.array_equal(result.stored().numpy(), expected)


def test_global_average_at_ties() -> None:
    stored = np.array([[[[1, 0]], [[3, 0]], [[5, 0]], [[2, 5]]]])
    result = deployed.global_average(centred(stored, 0, 1.0), quantizer(8, signed=False, step=1.0))
    assert result.codes.flatten().tolist() == [0.0, 2.0, 2.0, 4.0]  # 0.5, 1.5, 2.5, 3.5 half to even


def test_bias_codes() -> None:
    rng = np.random.default_rng(3)
    weight_scale = rng.uniform(1e-5, 1e-2, 500).astype(F32)
    bias = rng.normal(0, 2, 500).astype(F32)
    weight_scale[:4], bias[:4] = 0.5, [0.125, 0.375, 0.625, -0.125]  # ties at a product scale of 0.25
    input_scale = 0.5
    result = deployed.bias_codes(torch.from_numpy(bias), torch.tensor(input_scale) * torch.from_numpy(weight_scale))
    assert result[:4].tolist() == [0.0, 2.0, 2.0, 0.0]
    assert np.array_equal(result.numpy(), witness.bias_codes(bias, input_scale, weight_scale))


def batch_norm(gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(gamma))
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        norm.weight.copy_(gamma)
        norm.bias.copy_(beta)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    return norm


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def test_fold_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    step, gamma, variance = torch.rand(3, 300, generator=generator).add(0.01)
    bias, beta, mean = torch.randn(3, 300, generator=generator)
    negative = torch.where(torch.arange(300) % 2 == 0, -gamma, gamma)  # trained past 0, gamma counts by its size

    assert_same(
        deployed.fold(step, bias, batch_norm(negative, beta, mean, variance), torch.tensor(0.02)),
        deployed.fold(step, bias, batch_norm(gamma, beta, mean, variance), torch.tensor(0.02)),
    )
    scale, folded = deployed.fold(step, bias, batch_norm(gamma, beta, mean, variance), torch.tensor(0.02))

    gain = gamma.double() / (variance.double() + 1e-5).sqrt()
    # scale: 4 float32 roundings (add, square root, divide, multiply); each is 2^-24 at most
    assert bool(((scale.double() / (step.double() * gain) - 1).abs() <= 4.01 * 2**-24).all())
    closed = beta.double() + (bias.double() - mean.double()) * gain
    size = beta.abs().double() + (bias - mean).abs().double() * gain
    # bias: the gain's 3, then subtract, multiply, add
    assert bool(((folded.double() - closed).abs() <= 6.01 * 2**-24 * size).all())


@torch.no_grad()
def test_fold_without_batch_norm_changes_nothing() -> None:
    step, bias = torch.tensor([0.3, 0.7]), torch.tensor([1.5, -2.0])
    scale, folded = deployed.fold(step, bias, None, torch.tensor(0.02))
    assert torch.equal(scale, step) and torch.equal(folded, bias)
    scale, folded = deployed.fold(step, None, None, torch.tensor(0.02))
    assert torch.equal(scale, step) and torch.equal(folded, torch.zeros(2))


@pytest.mark.parametrize("input_scale", [1e-4, 0.02, 3.0])
@torch.no_grad()
def test_dead_channels_fit_int32(input_scale: float) -> None:
    """gamma 0; no variance; a huge bias on a tiny scale; all of it with steps down to the smallest."""
    gamma = torch.tensor([0.0, 0.0, 1e-8, 1.0, 1e-12, 1.0, 0.0, 1.0])
    beta = torch.tensor([0.0, 0.7, -0.3, 0.1, 1e6, -1e6, 1e-20, 1e30])
    mean = torch.tensor([0.0, 1.0, 0.2, 0.0, 0.0, 5.0, 1.0, 0.0])
    variance = torch.tensor([1.0, 1e-12, 1e-12, 0.0, 0.0, 1e-12, 1.0, 1.0])
    step = torch.tensor([0.1, 0.1, 1e-12, 1e-12, 0.1, 0.1, 1e-12, 1e-6])

    scale, bias = deployed.fold(step, None, batch_norm(gamma, beta, mean, variance), torch.tensor(input_scale))

    product_scale = torch.tensor(input_scale) * scale
    codes = deployed.bias_codes(bias, product_scale)
    for tensor in (scale, product_scale, bias, codes):
        assert bool(torch.isfinite(tensor).all())
    assert bool((product_scale >= torch.finfo(torch.float32).tiny).all())
    assert bool((codes.abs() <= 2**30 * (1 + 2**-21)).all())  # 2^30 up to the roundings of the floor
    # whatever the scale became, the bias is still the bias: half a code, or float32's rounding of a long one
    error = (codes.double() * product_scale.double() - bias.double()).abs()
    assert bool((error <= torch.maximum(0.5001 * product_scale.double(), bias.abs().double() * 2**-22)).all())


@torch.no_grad()
def test_only_a_bias_that_overflows_moves_the_scale() -> None:
    norm = batch_norm(torch.ones(2), torch.tensor([1e6, 1.0]), torch.zeros(2), torch.ones(2))
    step, input_scale = torch.tensor([1e-3, 1e-3]), torch.tensor(1e-2)
    scale, _ = deployed.fold(step, None, norm, input_scale)
    gain = torch.rsqrt(torch.tensor(1 + 1e-5))
    assert scale[1].item() == pytest.approx((step[1] * gain).item(), rel=3e-7)  # two float32 roundings
    assert scale[0].item() == pytest.approx(1e6 / (1e-2 * 2**30), rel=3e-7)


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize(("products", "weight"), [(514, 127), (515, -2), (600, -128), (600, 127)])
def test_accumulate_is_exact_on_both_sides_of_2_to_24(products: int, weight: int, convolution: bool) -> None:
    """514 products of any codes stay under 2^24; 600 large ones do not, and sums of odd numbers would be rounded there.

    The bias makes the last sum odd and long: the kernel's int32 is rounded to float32 once, half to even.
    """
    weights = np.full((2, products), weight)
    weights[:, 0] += 1
    stored = np.full((1, products), 255)
    bias = np.array([2**25 + 2, -1], np.float32)
    expected = (stored @ weights.T + bias.astype(np.int64)).astype(F32)
    if convolution:
        weights, stored = weights.reshape(2, products, 1, 1), stored.reshape(1, products, 1, 1)
    geometry = Geometry(stride=(1, 1), padding=(0, 0, 0, 0)) if convolution else None

    result = deployed.accumulate(
        centred(stored, 0, 0.1), torch.from_numpy(weights).float(), torch.from_numpy(bias), geometry
    )

    assert result.dtype == torch.float32
    assert np.array_equal(result.numpy().reshape(1, 2), expected)


def test_accumulate_reads_weights_only_where_it_must() -> None:
    """Reading them would make a GPU wait. A tensor without data cannot be read."""
    scale = torch.tensor(0.1)
    for products, readable in ((514, True), (515, False)):
        x = QTensor(torch.empty(4, products, device="meta"), scale, 0, 255)
        operands = torch.empty(3, products, device="meta"), torch.empty(3, device="meta"), None
        with nullcontext() if readable else pytest.raises(RuntimeError, match="meta"):
            assert deployed.accumulate(x, *operands).shape == (4, 3)


@pytest.mark.parametrize("convolution", [False, True])
def test_a_long_bias_is_added_exactly(convolution: bool) -> None:
    """Biases of a dead channel, at their limit of 2^30, beside short ones; gradients pass to all three operands."""
    rng = np.random.default_rng(1)
    stored, weight = rng.integers(0, 16, (2, 12)), rng.integers(-8, 8, (3, 12))
    bias = np.array([2**30, -(2**30) + 64, 7])
    expected = stored @ weight.T + bias
    if convolution:
        stored, weight, expected = stored.reshape(2, 3, 2, 2), weight.reshape(3, 3, 2, 2), expected[..., None, None]
    geometry = Geometry(stride=(1, 1), padding=(0, 0, 0, 0)) if convolution else None
    x = centred(stored, 0, 0.1, qmax=15)
    operands = [x.codes, torch.from_numpy(weight).float(), torch.from_numpy(bias).float()]
    for operand in operands:
        operand.requires_grad_()

    result = deployed.accumulate(x, operands[1], operands[2], geometry)

    assert np.array_equal(result.detach().numpy(), expected.astype(F32))
    result.sum().backward()
    gradients = (weight.sum(0), stored.sum(0), np.full(3, 2.0))
    for operand, gradient in zip(operands, gradients, strict=True):
        assert operand.grad is not None
        assert np.array_equal(operand.grad.numpy(), np.broadcast_to(gradient, operand.shape))


def test_accumulate_is_exact_where_float32_is_not() -> None:
    """20,000 products of 255 * 127: odd sums near 6.5e8."""
    rng = np.random.default_rng(0)
    stored, weight = rng.integers(200, 256, (3, 20_000)), rng.integers(64, 128, (2, 20_000))
    bias = np.array([1, -1])
    result = deployed.accumulate(
        centred(stored, 0, 0.1), torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), None
    )
    assert np.array_equal(result.numpy(), (stored @ weight.T + bias).astype(F32))


def test_what_is_not_a_number_stays_so_and_breaks_no_table():
    output = ActivationQuantizer(8, signed=False)
    nan = QTensor(torch.tensor([[float("nan"), 3.0]]), torch.tensor(0.5), 0, 255)
    for result in (deployed.add(nan, nan, [output])[0], deployed.sigmoid(nan, output)):
        assert result.codes.isnan().tolist() == [[True, False]]
