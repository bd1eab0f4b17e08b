"""Units end to end: evaluation against the numpy witness code for code, training against LSQ in float64."""

from __future__ import annotations

from typing import Any

import kernel_witness as witness
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training.geometry import Geometry, pair, sides
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.movement import DropoutUnit, MaxPoolUnit, ReshapeUnit
from mecdeploy.training.plans import Layer
from mecdeploy.training.quantizers import ActivationQuantizer, QTensor
from mecdeploy.training.units import AddUnit, GlobalAveragePoolUnit, WeightedUnit

F32 = np.float32


def random_codes(shape: tuple[int, ...], *, bits: int, signed: bool, scale: float, seed: int = 0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    zero_point = 2 ** (bits - 1) if signed else 0
    stored = torch.randint(0, 2**bits, shape, generator=generator)
    return QTensor(stored.float() - zero_point, torch.tensor(scale), zero_point, 2**bits - 1)


def quantizer(bits: int, *, signed: bool, step: float, maximum: float | None = None) -> ActivationQuantizer:
    output = ActivationQuantizer(bits, signed=signed, maximum=maximum)
    with torch.no_grad():
        output.step.fill_(step)
    return output


def random_batch_norm(channels: int, generator: torch.Generator) -> nn.BatchNorm2d:
    """Gammas of both signs and one of 0, statistics far from 0 and 1."""
    norm = nn.BatchNorm2d(channels)
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        norm.weight.copy_(torch.randn(channels, generator=generator))
        norm.weight[0] = 0.0
        norm.bias.copy_(torch.randn(channels, generator=generator))
        norm.running_mean.copy_(torch.randn(channels, generator=generator) * 0.3)
        norm.running_var.copy_(torch.rand(channels, generator=generator) + 0.05)
    return norm


def layer_of(module: nn.Conv2d | nn.Linear) -> Layer:
    """A module's tensors and geometry, as a unit takes them."""
    geometry = None
    if isinstance(module, nn.Conv2d):
        assert not isinstance(module.padding, str)
        geometry = Geometry(
            stride=pair(module.stride),
            padding=sides(module.padding),
            dilation=pair(module.dilation),
            groups=module.groups,
        )
    return Layer(weight=module.weight, bias=module.bias, geometry=geometry)


def weighted(
    layer: nn.Conv2d | nn.Linear, output: ActivationQuantizer | None, *, bits: int, norm: bool, seed: int = 0
) -> WeightedUnit:
    """A unit with random weights, irregular weight steps of its own for each channel, and a random BatchNorm."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    batch_norm = random_batch_norm(layer.weight.shape[0], generator) if norm else None
    unit = WeightedUnit(layer_of(layer), batch_norm, bits, output, ("y",))
    with torch.no_grad():
        spread = 0.7 + 0.6 * torch.rand(layer.weight.shape[0], generator=generator)
        unit.weight_quantizer.step.copy_(spread * 2.2 / 2 ** (bits - 1))
    return unit


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def expected_weighted(unit: WeightedUnit, x: QTensor, **geometry: Any) -> np.ndarray:
    """What the kernel computes from a unit's parameters: stored codes, or logits."""
    bits, weight = unit.weight_quantizer.bits, array(unit.weight)
    step = array(unit.weight_quantizer.step)
    ratio = (weight.reshape(len(step), -1) / step[:, None]).reshape(weight.shape)
    codes = np.clip(np.rint(ratio), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int64)
    bias = np.zeros_like(step) if unit.bias is None else array(unit.bias)
    scale, norm = step, unit.batch_norm
    if norm is not None:
        gain = np.abs(array(norm.weight)) / np.sqrt(array(norm.running_var) + F32(norm.eps))
        scale = step * gain
        bias = array(norm.bias) + (bias - array(norm.running_mean)) * gain
    input_scale = F32(x.scale.item())
    scale = np.maximum(scale, np.maximum(np.abs(bias) / (input_scale * F32(2**30)), F32(1e-30)))
    integers = witness.bias_codes(bias, float(input_scale), scale)
    centred = array(x.codes).astype(np.int64)
    if weight.ndim == 2:
        accumulator = centred @ codes.T + integers
    else:
        accumulator = witness.convolve(centred, codes, **geometry) + integers[:, None, None]
    if unit.output is None:
        return witness.logits(accumulator, float(input_scale), scale)
    y_step = float(array(unit.output.step))
    if unit.output.maximum is not None:
        y_step = min(y_step, float(F32(unit.output.maximum / unit.output.qmax)))
    return witness.requantize(accumulator, float(input_scale), scale, y_step, unit.output.zero_point, unit.output.qmax)


GEOMETRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # kernel and channels of the layer; geometry shared by layer and witness
    "plain": ({"kernel_size": 3}, {}),
    "padded": ({"kernel_size": 3}, {"padding": (1, 1)}),
    "uneven": ({"kernel_size": (2, 3)}, {"stride": (2, 1), "padding": (0, 2)}),
    "dilated": ({"kernel_size": 2}, {"dilation": (2, 3), "padding": (1, 2)}),
    "grouped": ({"kernel_size": 3}, {"groups": 2, "padding": (1, 1), "stride": (2, 2)}),
    "depthwise": ({"kernel_size": 3}, {"groups": 4, "padding": (1, 1)}),
    "pointwise": ({"kernel_size": 1}, {}),
}


@pytest.mark.parametrize("kind", GEOMETRIES)
@pytest.mark.parametrize(("bias", "norm"), [(False, True), (True, False), (True, True), (False, False)])
def test_convolution(kind: str, bias: bool, norm: bool) -> None:
    shape, geometry = GEOMETRIES[kind]
    x = random_codes((2, 4, 7, 6), bits=4, signed=True, scale=0.31)
    unit = weighted(
        nn.Conv2d(4, 8, **shape, **geometry, bias=bias), quantizer(4, signed=False, step=0.21), bits=3, norm=norm
    ).eval()

    result = unit(x)

    expected = expected_weighted(unit, x, **geometry)
    assert np.array_equal(array(result.stored()), expected)
    assert len(np.unique(expected)) > 8, "the case should use its range"


@pytest.mark.parametrize("weight_bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("act_bits", "signed"), [(2, False), (2, True), (3, True), (4, False), (8, False), (8, True)])
def test_convolution_at_every_width(weight_bits: int, act_bits: int, signed: bool) -> None:
    x = random_codes((2, 3, 5, 5), bits=act_bits, signed=signed, scale=2.0**-act_bits)
    output = quantizer(act_bits, signed=signed, step=4.3 * 2.0**-act_bits)
    unit = weighted(nn.Conv2d(3, 6, 3, padding=1), output, bits=weight_bits, norm=True).eval()
    result = unit(x)
    assert (result.zero_point, result.qmax) == (2 ** (act_bits - 1) if signed else 0, 2**act_bits - 1)
    assert np.array_equal(array(result.stored()), expected_weighted(unit, x, padding=(1, 1)))


@pytest.mark.parametrize("step", [0.3, 9.0])
def test_relu6_saturates_at_6(step: float) -> None:
    """A step above 6 / qmax is held there: code 15 is real 6, and nothing is above."""
    x = random_codes((2, 4, 6, 6), bits=8, signed=False, scale=0.02)
    output = quantizer(4, signed=False, step=step, maximum=6.0)
    unit = weighted(nn.Conv2d(4, 6, 3), output, bits=4, norm=False).eval()
    result = unit(x)
    assert np.array_equal(array(result.stored()), expected_weighted(unit, x))
    assert result.codes.max().item() == 15.0
    assert result.dequantize().max().item() <= 6.0


@pytest.mark.parametrize("bias", [False, True])
def test_linear_with_an_output_quantizer(bias: bool) -> None:
    x = random_codes((5, 40), bits=4, signed=False, scale=0.11)
    unit = weighted(nn.Linear(40, 7, bias=bias), quantizer(3, signed=True, step=1.7), bits=4, norm=False).eval()
    assert np.array_equal(array(unit(x).stored()), expected_weighted(unit, x))


@pytest.mark.parametrize("bits", [2, 8])
def test_linear_gives_logits(bits: int) -> None:
    x = random_codes((5, 40), bits=8, signed=True, scale=0.11)
    unit = weighted(nn.Linear(40, 7), None, bits=bits, norm=False).eval()
    result = unit(x)
    assert result.dtype == torch.float32
    assert np.array_equal(array(result), expected_weighted(unit, x))


@pytest.mark.parametrize(("signed", "relu"), [(True, True), (False, True), (True, False)])
def test_add_quantises_one_sum_for_each_reader(signed: bool, relu: bool) -> None:
    a = random_codes((2, 3, 8, 8), bits=8, signed=signed, scale=0.021, seed=1)
    b = random_codes((2, 3, 8, 8), bits=8, signed=False, scale=0.034, seed=2)
    outputs = [quantizer(8, signed=not relu, step=0.05), quantizer(4, signed=not relu, step=0.61)]
    results = AddUnit(outputs, ("y/skip", "y/act")).eval()(a, b)
    for output, result in zip(outputs, results, strict=True):
        expected = witness.add(
            array(a.stored()), 0.021, a.zero_point, array(b.stored()), 0.034, 0,
            output.step.item(), output.zero_point, output.qmax,
        )  # fmt: skip
        assert np.array_equal(array(result.stored()), expected)


def test_add_with_one_output_gives_it_alone() -> None:
    a = random_codes((2, 3), bits=4, signed=True, scale=0.3)
    result = AddUnit([quantizer(8, signed=True, step=0.07)], ("y",)).eval()(a, a)
    expected = witness.add(array(a.stored()), 0.3, 8, array(a.stored()), 0.3, 8, 0.07, 128, 255)
    assert np.array_equal(array(result.stored()), expected)


def test_live_sums_and_means_quantise_reals() -> None:
    """In float64, away from ties; straight-through gradients of 1 to either side, of 1 / n to every position."""
    a = random_codes((2, 3, 4, 4), bits=8, signed=True, scale=0.021, seed=1)
    b = random_codes((2, 3, 4, 4), bits=4, signed=False, scale=0.34, seed=2)
    a.codes.requires_grad_()
    b.codes.requires_grad_()
    total = AddUnit([quantizer(8, signed=True, step=0.053)], ("y",)).train()(a, b)
    exact = (a.codes.detach().double() * 0.021 + b.codes.detach().double() * 0.34) / 0.053
    clear = (exact - exact.floor() - 0.5).abs() > 1e-3
    assert clear.double().mean().item() > 0.9
    assert torch.equal(total.codes[clear].double(), exact.round().clamp(-128, 127)[clear])
    total.dequantize().sum().backward()
    inside = ((exact > -128) & (exact < 127)).float()
    torch.testing.assert_close(a.codes.grad, 0.021 * inside, rtol=1e-6, atol=0)  # three float32 products
    torch.testing.assert_close(b.codes.grad, 0.34 * inside, rtol=1e-6, atol=0)

    b.codes.grad = None
    mean = GlobalAveragePoolUnit([quantizer(8, signed=False, step=0.0171)], ("y",)).train()(b)
    exact = b.codes.detach().double().mean((2, 3), keepdim=True) * 0.34 / 0.0171
    assert torch.equal(mean.codes.double(), exact.round().clamp(0, 255))
    mean.dequantize().sum().backward()
    torch.testing.assert_close(b.codes.grad, torch.full((2, 3, 4, 4), 0.34 / 16), rtol=1e-6, atol=0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "ceil_mode"),
    [
        ((2, 2), (2, 2), (0, 0), (1, 1), False),
        ((3, 3), (2, 2), (1, 1), (1, 1), False),
        ((3, 2), (2, 1), (1, 0), (1, 2), False),
        ((2, 2), (2, 2), (0, 0), (1, 1), True),
    ],
)
def test_max_pool(kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, training: bool) -> None:
    x = random_codes((2, 3, 7, 9), bits=4, signed=True, scale=0.5)
    geometry = Geometry(stride=stride, padding=sides(padding), dilation=dilation)
    result = MaxPoolUnit(kernel, geometry, ceil_mode, ("y",)).train(training)(x)
    layer = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
    size = tuple(layer(torch.zeros(1, 1, 7, 9)).shape[2:])  # torch's sizes; the values are the witness's
    expected = witness.max_pool(array(x.stored()), kernel, stride, padding, dilation, size)  # type: ignore[arg-type]
    assert np.array_equal(array(result.stored()), expected)
    assert (result.scale, result.zero_point, result.qmax) == (x.scale, x.zero_point, x.qmax)


def test_global_average_flatten_and_dropout() -> None:
    x = random_codes((2, 5, 3, 4), bits=8, signed=True, scale=0.2)
    pool = GlobalAveragePoolUnit([quantizer(8, signed=True, step=0.031)], ("p",)).eval()
    pooled = pool(x)
    assert np.array_equal(array(pooled.stored()), witness.global_average(array(x.stored()), 0.2, 128, 0.031, 128, 255))
    flat = ReshapeUnit((60,), ("f",)).eval()(x)
    assert np.array_equal(array(flat.stored()), array(x.stored()).reshape(2, 60))
    dropout = DropoutUnit(0.5, ("d",))
    assert torch.equal(dropout.eval()(x).codes, x.codes)
    dropout.train().frozen = True
    assert torch.equal(dropout(x).codes, x.codes)


def test_dropout_in_training_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    x = QTensor(torch.full((1, 40_000), 3.0), torch.tensor(0.5), 0, 15)
    dropped = DropoutUnit(0.25, ("d",)).train()(x)
    assert sorted(set(dropped.codes.flatten().tolist())) == [0.0, 4.0]
    kept = (dropped.codes > 0).double().mean().item()
    assert abs(kept - 0.75) < 4 * (0.75 * 0.25 / 40_000) ** 0.5  # four standard deviations


def some_units() -> dict[str, tuple[nn.Module, tuple[QTensor, ...]]]:
    """One of each kind that has arithmetic, and what it reads."""
    image = random_codes((4, 4, 6, 6), bits=4, signed=False, scale=0.17)
    other = random_codes((4, 4, 6, 6), bits=8, signed=True, scale=0.03, seed=5)
    vector = random_codes((4, 12), bits=8, signed=False, scale=0.02)
    return {
        "conv": (weighted(nn.Conv2d(4, 6, 3), quantizer(4, signed=False, step=0.4), bits=4, norm=True), (image,)),
        "depthwise": (
            weighted(nn.Conv2d(4, 4, 3, groups=4, padding=1), quantizer(2, signed=True, step=1.1), bits=2, norm=True),
            (other,),
        ),
        "linear": (weighted(nn.Linear(12, 5), quantizer(4, signed=False, step=0.2), bits=3, norm=False), (vector,)),
        "logits": (weighted(nn.Linear(12, 5), None, bits=8, norm=False), (vector,)),
        "add": (
            AddUnit([quantizer(8, signed=False, step=0.02131), quantizer(4, signed=False, step=0.2173)], ("s", "a")),
            (image, other),
        ),
        "pool": (GlobalAveragePoolUnit([quantizer(8, signed=False, step=0.011)], ("p",)), (image,)),
    }


@pytest.mark.parametrize("kind", ["conv", "depthwise", "linear", "logits", "add", "pool"])
def test_frozen_training_computes_what_evaluation_computes(kind: str) -> None:
    unit, reads = some_units()[kind]
    evaluated = unit.eval()(*reads)
    before = {name: value.clone() for name, value in unit.state_dict().items()}
    unit.train().frozen = True  # type: ignore[assignment]
    trained = unit(*reads)

    pairs = zip(
        trained if isinstance(trained, tuple) else (trained,),
        evaluated if isinstance(evaluated, tuple) else (evaluated,),
        strict=True,
    )
    for ours, theirs in pairs:
        if isinstance(ours, QTensor):
            assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scale, theirs.scale)
        else:
            assert torch.equal(ours, theirs)
    for name, value in unit.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} moved while frozen"


def test_training_moves_the_running_statistics() -> None:
    unit, (x,) = some_units()["conv"]
    assert isinstance(unit, WeightedUnit) and unit.batch_norm is not None
    norm = unit.batch_norm
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    codes, step = unit.weight_quantizer(unit.weight)
    y = F.conv2d(x.dequantize().double(), (codes * step.view(-1, 1, 1, 1)).double(), unit.bias.double()).detach()

    unit.train()(x)

    count = y.numel() / y.shape[1]
    expected_mean = 0.9 * mean + 0.1 * y.mean((0, 2, 3))
    expected_variance = 0.9 * variance + 0.1 * y.var((0, 2, 3), unbiased=False) * count / (count - 1)
    # float32 sums of 64 values
    torch.testing.assert_close(norm.running_mean.double(), expected_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), expected_variance, rtol=1e-5, atol=1e-5)


def straight_through(v: Tensor, step: Tensor, lower: int, upper: int, factor: float) -> Tensor:
    """LSQ in float64 through autograd's own clamp: real values, gradients as in the paper, the step's times factor."""
    step = step * factor + (step * (1 - factor)).detach()
    ratio = (v / step).clamp(lower, upper)
    return (ratio + (ratio.round() - ratio).detach()) * step


def real_valued(
    unit: WeightedUnit, codes: Tensor, scale: Tensor, *, live: bool
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The unit on reals in float64: quantised weight, convolution, BatchNorm (live: of the batch), quantised output.

    Returns the real output, the leaves by parameter name, and the output before rounding in steps.
    """
    leaf = {name: p.detach().double().requires_grad_() for name, p in unit.named_parameters()}
    leaf["codes"], leaf["scale"] = codes.detach().double().requires_grad_(), scale.detach().double().requires_grad_()
    bits, weight = unit.weight_quantizer.bits, leaf["weight"]
    upper = 2 ** (bits - 1) - 1
    step = leaf["weight_quantizer.step"].view(-1, *[1] * (weight.dim() - 1))
    weight = straight_through(weight, step, -upper - 1, upper, (weight[0].numel() * upper) ** -0.5)
    x = leaf["codes"] * leaf["scale"]
    y = F.linear(x, weight, leaf.get("bias")) if weight.dim() == 2 else F.conv2d(x, weight, leaf.get("bias"))
    norm = unit.batch_norm
    if norm is not None:
        assert norm.running_mean is not None and norm.running_var is not None
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        gamma, beta = leaf["batch_norm.weight"], leaf["batch_norm.bias"]
        y = F.batch_norm(y, mean.clone(), variance.clone(), gamma, beta, training=live, eps=norm.eps)
    assert unit.output is not None
    lower, upper = -unit.output.zero_point, unit.output.qmax - unit.output.zero_point
    factor = (y[0].numel() * max(1, upper)) ** -0.5
    step = leaf["outputs.0.step"]
    return straight_through(y, step, lower, upper, factor), leaf, (y / step).detach()


def gradients(unit: WeightedUnit, x: QTensor, upstream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    codes, scale = x.codes.clone().requires_grad_(), x.scale.clone().requires_grad_()
    unit.zero_grad()
    real = unit(QTensor(codes, scale, x.zero_point, x.qmax)).dequantize()
    (real * upstream).sum().backward()
    grads = {name: p.grad for name, p in unit.named_parameters() if p.grad is not None}
    return real.detach(), {**grads, "codes": codes.grad, "scale": scale.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_gradients_without_batch_norm_and_bias_are_lsqs(kind: str, frozen: bool) -> None:
    """Nothing but the roundings of the paper is in the way, so both modes have exactly LSQ's gradients."""
    layer = nn.Conv2d(4, 6, 3, bias=False) if kind == "conv" else nn.Linear(12, 5, bias=False)
    shape = (3, 4, 6, 6) if kind == "conv" else (9, 12)
    x = random_codes(shape, bits=4, signed=True, scale=0.17, seed=3)
    unit = weighted(layer, quantizer(4, signed=False, step=0.31), bits=4, norm=False).train()
    unit.frozen = frozen
    expected, leaf, ratio = real_valued(unit, x.codes, x.scale, live=False)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    # Integers can add up to exactly 0, the lower bound, where float64 makes 1e-17 of them.
    upstream = torch.where(ratio.abs() < 1e-9, 0.0, upstream)
    (expected * upstream.double()).sum().backward()

    real, grads = gradients(unit, x, upstream)

    # 1e-5: float32 sums of some hundred terms
    torch.testing.assert_close(real.double(), expected.detach(), rtol=1e-5, atol=0)
    assert set(grads) == set(leaf)
    for name, value in grads.items():
        size = leaf[name].grad.abs().max().item()
        assert size > 0
        torch.testing.assert_close(value.double(), leaf[name].grad, rtol=0, atol=1e-5 * size, msg=name)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["add", "pool"])
def test_gradients_of_sums_and_means_are_lsqs(kind: str, frozen: bool) -> None:
    """To both readings of a sum, both its inputs, their scales and every step."""
    unit, reads = some_units()[kind]
    unit.train().frozen = frozen  # type: ignore[assignment]
    quantizers = [module for module in unit.modules() if isinstance(module, ActivationQuantizer)]
    leaves = [tensor.clone().requires_grad_() for x in reads for tensor in (x.codes, x.scale)]
    exact = [tensor.detach().double().requires_grad_() for tensor in (*leaves, *(q.step for q in quantizers))]
    total = sum(exact[2 * i] * exact[2 * i + 1] for i in range(len(reads)))
    assert isinstance(total, Tensor)
    total = total.mean((2, 3), keepdim=True) if kind == "pool" else total
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(total.shape, generator=generator) for _ in quantizers]
    for quantizer_, step, g in zip(quantizers, exact[2 * len(reads) :], upstream, strict=True):
        upper = quantizer_.qmax - quantizer_.zero_point
        real = straight_through(total, step, -quantizer_.zero_point, upper, (total[0].numel() * upper) ** -0.5)
        (real * g.double()).sum().backward(retain_graph=True)

    inputs = [QTensor(leaves[2 * i], leaves[2 * i + 1], x.zero_point, x.qmax) for i, x in enumerate(reads)]
    results = unit(*inputs)
    for result, g in zip(results if isinstance(results, tuple) else (results,), upstream, strict=True):
        (result.dequantize() * g).sum().backward(retain_graph=True)

    for ours, theirs in zip([*leaves, *(q.step for q in quantizers)], exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None and bool(theirs.grad.any())
        # 1e-4: float32 sums of some hundred terms, of which the steps' cancel to a tenth
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=1e-4 * theirs.grad.abs().max().item())


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_with_batch_norm(frozen: bool) -> None:
    """Live: BatchNorm of the batch. Frozen: BatchNorm with its running statistics, the bias rounded to a code.

    That rounding moves a value by half a code of the accumulator, which is M / 2 of an output step. Where no value lies
    so near to a bound of the range, gradients move by no more.
    """
    x = random_codes((3, 4, 6, 6), bits=8, signed=True, scale=0.011)
    unit = weighted(nn.Conv2d(4, 6, 3), quantizer(4, signed=False, step=0.23), bits=8, norm=True, seed=10).train()
    assert unit.batch_norm is not None and unit.batch_norm.running_var is not None
    with torch.no_grad():
        unit.batch_norm.weight[0] = 0.4  # |gamma| has no gradient at the 0 that random_batch_norm puts here
    gain = unit.batch_norm.weight / (unit.batch_norm.running_var + unit.batch_norm.eps).sqrt()
    multiplier = (0.011 * unit.weight_quantizer.step * gain / 0.23).max().item()
    expected, leaf, ratio = real_valued(unit, x.codes, x.scale, live=not frozen)
    nearest = torch.minimum(ratio.abs(), (ratio - 15).abs()).min().item()
    assert multiplier / 2 < nearest, "the case must be clear of the bounds"
    assert 0.2 < ((ratio > 0) & (ratio < 15)).double().mean().item() < 0.8, "the case must have values in and out"
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * upstream.double()).sum().backward()
    unit.frozen = frozen

    real, grads = gradients(unit, x, upstream)

    clear = (ratio - ratio.floor() - 0.5).abs() > multiplier  # away from ties
    torch.testing.assert_close(real[clear].double(), expected[clear].detach(), rtol=1e-6, atol=0)
    assert set(grads) == set(leaf)
    for name, value in grads.items():
        error = (value.double() - leaf[name].grad).norm().item()
        size = leaf[name].grad.norm().item()
        if not frozen and name in ("bias", "scale"):  # the batch statistics take these away: what is left is rounding
            size = {"bias": upstream.abs().sum().item(), "scale": 1.0 / 0.011}[name]
        assert error <= multiplier * size, name


def test_negative_gamma_is_absorbed_without_a_change() -> None:
    """Signs cost no rounding: evaluation, training and running statistics of the float layers keep their bits."""
    generator = torch.Generator().manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 3), random_batch_norm(8, generator)
    x = torch.randn(4, 3, 6, 6, generator=generator)
    evaluated = norm.eval()(conv(x))
    own = random_batch_norm(8, torch.Generator().manual_seed(0))
    unit = WeightedUnit(layer_of(conv), own, 4, quantizer(4, signed=False, step=1.0), ("y",))
    flipped = norm.weight < 0
    assert 0 < int(flipped.sum()) < 8

    assert unit.batch_norm is own and bool((own.weight >= 0).all())
    assert torch.equal(unit.weight[flipped], -conv.weight[flipped])
    assert torch.equal(unit.weight[~flipped], conv.weight[~flipped])
    y = F.conv2d(x, unit.weight, unit.bias)
    assert torch.equal(own.eval()(y), evaluated)
    assert torch.equal(own.train()(y), norm.train()(conv(x)))
    sign = torch.where(flipped, -1.0, 1.0)
    assert torch.equal(own.running_mean * sign, norm.running_mean)
    assert torch.equal(own.running_var, norm.running_var)


def test_input_spec() -> None:
    spec = InputSpec.from_statistics(channels=3, height=2, width=2, mean=120.7, std=64.1)
    assert spec.pixel_zero_point == 121
    assert spec.pixel_scale == float(F32(1 / 64.1))
    pixels = torch.tensor([0, 121, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    assert spec.normalize(pixels).flatten().tolist() == [float(F32(v) * F32(1 / 64.1)) for v in (-121, 0, 134)]
    quantized = spec.quantized(pixels)
    assert torch.equal(quantized.dequantize(), spec.normalize(pixels))
    assert torch.equal(quantized.stored(), pixels) and quantized.qmax == 255


def test_input_spec_of_a_constant_data_set() -> None:
    spec = InputSpec.from_statistics(channels=1, height=2, width=2, mean=255.4, std=0.0)
    assert (spec.pixel_zero_point, spec.pixel_scale) == (255, 1.0)
