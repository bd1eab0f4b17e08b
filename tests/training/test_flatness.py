"""Curvature against full matrices, finite differences, and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_networks import SPEC, images, tiny_residual
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mecdeploy.training.calibration import calibrate
from mecdeploy.training.composed import twice_differentiable
from mecdeploy.training.config import QuantConfig
from mecdeploy.training.curvature import TOLERANCE, MeanLoss, filter_norms, top_eigenvalue, trace
from mecdeploy.training.data import Batch
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.flatness import Flatness, layer_weights, measure_flatness
from mecdeploy.training.lsq import quantize
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.preparation import prepare


def symmetric(eigenvalues: list[float], seed: int = 0) -> Tensor:
    random = torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64, generator=seeded(seed))
    basis = torch.linalg.qr(random)[0]
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("largest", [5.0, -5.0])
def test_power_iteration_finds_the_largest_magnitude(largest: float) -> None:
    matrix = symmetric([largest, 3.0, -2.0, 1.0, 0.0, 0.1])
    start, told = torch.randn(6, dtype=torch.float64, generator=seeded(1)), []
    found, residual, done = top_eigenvalue(lambda v: matrix @ v, start, iterations=200, progress=told.append)
    # A Rayleigh quotient is off by at most residual^2 / gap, and the gap is 2.
    assert abs(found - largest) <= residual**2 / 2
    assert residual <= TOLERANCE * 5
    assert told == list(range(1, done + 1)) and done < 200


def test_power_iteration_says_where_it_stands() -> None:
    matrix = symmetric([1.0, 0.9999, 0.5])
    start = torch.randn(3, dtype=torch.float64, generator=seeded(2))
    found, residual, done = top_eigenvalue(lambda v: matrix @ v, start, iterations=2)
    assert done == 2 and residual > TOLERANCE * found
    direction = matrix @ start / (matrix @ start).norm()
    assert found == pytest.approx(float(direction @ matrix @ direction), rel=1e-12)
    assert residual == pytest.approx(float((matrix @ direction - found * direction).norm()), rel=1e-9)
    assert top_eigenvalue(torch.zeros_like, start, iterations=5) == (0.0, 0.0, 1)


def test_the_trace_of_a_diagonal_matrix_is_exact() -> None:
    """z_i H_ii z_i = H_ii for signs z: no variance."""
    diagonal = torch.tensor([3.0, -1.0, 0.5])
    assert trace(lambda v: diagonal * v, diagonal, probes=3, generator=seeded(0)) == (2.5, 0.0)


def test_the_trace_of_any_matrix_is_unbiased_and_knows_its_error() -> None:
    matrix = symmetric([4.0, 2.0, -1.0, 0.5, 0.2])
    found, error = trace(lambda v: matrix @ v, matrix[0], probes=4000, generator=seeded(3))
    # Hutchinson's variance with signs: twice the sum of squares off the diagonal.
    off = matrix - torch.diag(matrix.diagonal())
    assert error == pytest.approx(float((2 * off.square().sum() / 4000).sqrt()), rel=0.1)  # an error of 4000 draws: 2%
    assert abs(found - 5.7) < 4 * error  # 4 sigma


class Tiny(nn.Module):
    """60 weights: two convolutions with BatchNorm, a residual sum, pooling, a linear layer."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 2, 3, 2, 1, bias=False)
        self.second = nn.Conv2d(2, 2, 3, 1, 1, bias=False)
        self.first_bn, self.second_bn = nn.BatchNorm2d(2, eps=1e-12), nn.BatchNorm2d(2, eps=1e-12)
        self.activation = activation
        self.fc = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.first_bn(self.first(x)))
        x = self.activation(self.second_bn(self.second(x)) + x)
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def tiny(activation: nn.Module | None = None) -> Tiny:
    """With running statistics that fit the images, and weights that tell classes apart a little."""
    torch.manual_seed(3)
    network = Tiny(activation or nn.ReLU())
    with torch.no_grad():
        network.fc.weight.mul_(4)
        for _ in range(40):
            network.train()(SPEC.normalize(images(32)))
    return network.eval()


def quantized(bits: int = 4) -> QuantizedModel:
    model = prepare(tiny(), QuantConfig(weight_bits=bits, act_bits=bits), SPEC)
    calibrate(model, [images(32)])
    return model.eval()


def batches(count: int = 24, size: int = 10) -> list[Batch]:
    pixels, labels = images(count, seed=7), torch.arange(count) % 3
    return [Batch((p,), own) for p, own in zip(pixels.split(size), labels.split(size), strict=True)]


def full_hessian(network: nn.Module, weights: dict[str, Tensor]) -> Tensor:
    """Row by row, over all images at once, through torch's own functional Hessian: [P, P] in float64."""
    shapes = {name: weight.shape for name, weight in weights.items()}
    flat = torch.cat([weight.detach().reshape(-1) for weight in weights.values()])
    prefix = "body." if isinstance(network, QuantizedModel) else ""

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes.values()])
        given = {f"{prefix}{name}": p.view(shape) for (name, shape), p in zip(shapes.items(), pieces, strict=True)}
        pixels = images(24, seed=7)
        logits = functional_call(network, given, (pixels if prefix else SPEC.normalize(pixels).to(flat.dtype),))
        return F.cross_entropy(logits, torch.arange(24) % 3)

    with twice_differentiable():
        matrix: Tensor = torch.autograd.functional.hessian(loss, flat)  # type: ignore[no-untyped-call]
    return matrix.double()


@pytest.mark.parametrize("bits", [2, 4])
def test_a_quantised_network_against_its_full_hessian(bits: int) -> None:
    model = quantized(bits)
    weights = layer_weights(model)
    matrix = full_hessian(model, dict(weights))
    assert matrix.shape == (96, 96) and float((matrix - matrix.T).abs().max()) < 1e-5 * float(matrix.abs().max())
    found = measure_flatness(model, SPEC, batches(), probes=60, iterations=500)
    scale = np.concatenate(
        [np.repeat(np.linalg.norm(w.detach().flatten(1), axis=1), w[0].numel()) for w in weights.values()]
    )
    for curvature, expected in (
        (found.raw, matrix.numpy()),
        (found.normalized, scale[:, None] * matrix.numpy() * scale),
    ):
        eigenvalues = np.linalg.eigvalsh(expected)
        largest = eigenvalues[np.abs(eigenvalues).argmax()]
        assert curvature.converged and curvature.residual <= 0.01 * abs(largest) * 1.001
        # Float32 gradients of some 24 x 16 positions: 1e-4; and the Rayleigh quotient, off by residual^2 / gap.
        others = np.abs(eigenvalues - largest)
        gap = others[others > 1e-9].min()
        assert abs(curvature.eigenvalue - largest) <= curvature.residual**2 / gap + 1e-4 * abs(largest)
        assert abs(curvature.trace - np.trace(expected)) <= 4 * curvature.trace_error  # 4 sigma
        assert abs(np.trace(expected)) > 3 * curvature.trace_error  # the estimate says something


def test_every_product_is_a_column_of_the_full_hessian() -> None:
    model = quantized()
    weights = layer_weights(model)
    matrix = full_hessian(model, dict(weights))
    with twice_differentiable():
        loss = MeanLoss(model, list(weights.values()), batches())
        columns = torch.stack([loss.hessian_product(column) for column in torch.eye(len(matrix))]).double()
    # Float32, summed in another order.
    torch.testing.assert_close(columns, matrix, rtol=1e-4, atol=1e-5 * float(matrix.abs().max()))
    assert int((columns.abs() > 1e-6).sum()) > 1000


def test_a_network_in_full_precision_against_its_full_hessian() -> None:
    network = tiny().double()
    weights = layer_weights(network)
    matrix = full_hessian(network, dict(weights)).numpy()
    loss = MeanLoss(lambda pixels: network(SPEC.normalize(pixels).double()), list(weights.values()), batches())
    columns = torch.stack([loss.hessian_product(column) for column in torch.eye(len(matrix)).double()]).numpy()
    np.testing.assert_allclose(columns, matrix, rtol=1e-9, atol=1e-12)  # float64


def test_products_against_finite_differences_of_gradients() -> None:
    """In a smooth network, in float64: central differences are off by h^2 and by rounding / h, both about 1e-9."""
    network = tiny(nn.Tanh()).double()
    weights = list(layer_weights(network).values())
    loss = MeanLoss(lambda pixels: network(SPEC.normalize(pixels).double()), weights, batches())
    direction = torch.randn(96, dtype=torch.float64, generator=seeded(4))
    sides = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for weight, piece in zip(weights, direction.split([w.numel() for w in weights]), strict=True):
                weight += step * piece.view(weight.shape)
            before = [weight.clone() for weight in weights]
        sides.append(loss.gradient()[1])
        with torch.no_grad():
            for weight, moved, piece in zip(
                weights, before, direction.split([w.numel() for w in weights]), strict=True
            ):
                weight.copy_(moved - step * piece.view(weight.shape))
    expected = (sides[0] - sides[1]) / 2e-5
    torch.testing.assert_close(loss.hessian_product(direction), expected, rtol=1e-6, atol=1e-7)


def test_the_second_derivatives_are_those_with_rounding_residuals_held() -> None:
    """In numpy: codes = c0 + inside * (z - z0) with c0, z0 and inside fixed; then finite differences of the loss."""
    generator = np.random.default_rng(5)
    x, labels = generator.normal(size=(12, 4)), np.arange(12) % 3
    start = generator.normal(size=4 * 5 + 5 * 3)
    steps = (0.4, 0.3, 0.5)  # first weight, activation, second weight

    def network(flat: np.ndarray, held: list[Any] | None) -> tuple[float, list[Any]]:
        kept: list[Any] = []

        def quantized(z: np.ndarray, lower: int, upper: int) -> np.ndarray:
            if held is None:
                kept.append((np.clip(np.round(z), lower, upper), z, (z > lower) & (z < upper)))
                return kept[-1][0]
            codes, at, inside = held[len(kept)]
            kept.append(None)
            return codes + inside * (z - at)

        first = quantized(flat[:20].reshape(5, 4) / steps[0], -4, 3) * steps[0]
        hidden = quantized(x @ first.T / steps[1], 0, 7) * steps[1]
        second = quantized(flat[20:].reshape(3, 5) / steps[2], -2, 1) * steps[2]
        logits = hidden @ second.T
        losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(12), labels]
        return float(losses.mean()), kept

    value, held = network(start, None)
    step, size = 1e-4, len(start)
    around = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            moved = [start + step * (a * np.eye(size)[i] + b * np.eye(size)[j]) for a in (1, -1) for b in (1, -1)]
            corners = [network(point, held)[0] for point in moved]
            around[i, j] = (corners[0] - corners[1] - corners[2] + corners[3]) / (4 * step**2)

    weights = [torch.from_numpy(start[:20].reshape(5, 4).copy()), torch.from_numpy(start[20:].reshape(3, 5).copy())]
    weights = [weight.requires_grad_() for weight in weights]
    scales = [torch.tensor(step, dtype=torch.float64) for step in steps]

    def logits(x: Tensor) -> Tensor:
        first = quantize(weights[0], scales[0], -4, 3) * scales[0]
        hidden = quantize(x @ first.T, scales[1], 0, 7) * scales[1]
        return hidden @ (quantize(weights[1], scales[2], -2, 1) * scales[2]).T

    with twice_differentiable():
        loss = MeanLoss(logits, weights, [Batch((torch.from_numpy(x),), torch.from_numpy(labels))])
        assert loss.gradient()[0] == pytest.approx(value, rel=1e-12)
        found = torch.stack([loss.hessian_product(column) for column in torch.eye(size).double()]).numpy()
    # Differences of values: rounding 1e-16 / step^2 and truncation step^2, both 1e-8.
    np.testing.assert_allclose(found, around, atol=1e-6)
    assert (np.abs(found) > 1e-3).sum() > 100 and (np.abs(found).sum(1) == 0).any()  # curved, and some are clipped


def test_rescaled_filters_change_the_raw_curvature_alone() -> None:
    """What BatchNorm undoes: a filter three times as large, with running statistics to match."""
    network = tiny().double()

    def measured() -> Flatness:
        class Double(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return network(x.double())

        wrapped = Double()
        wrapped.network = network
        return measure_flatness(wrapped, SPEC, batches(), probes=4, iterations=300)

    before = measured()
    with torch.no_grad():
        for layer, norm in ((network.first, network.first_bn), (network.second, network.second_bn)):
            layer.weight.mul_(3)
            norm.running_mean.mul_(3)
            norm.running_var.mul_(9)
    after = measured()
    assert after.loss == pytest.approx(before.loss, rel=1e-9)
    # BatchNorm's eps of 1e-12 is all that is not scaled; first direction and probes are the same.
    assert after.normalized.eigenvalue == pytest.approx(before.normalized.eigenvalue, rel=1e-6)
    assert after.normalized.trace == pytest.approx(before.normalized.trace, rel=1e-6)
    assert after.raw.trace != pytest.approx(before.raw.trace, rel=0.05)


def test_filter_norms() -> None:
    weight = torch.zeros(2, 3, 1, 2)
    weight[0, 0], weight[1, 2] = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert filter_norms([weight, torch.tensor([[6.0, 8.0]])]).tolist() == [5.0] * 6 + [2.0] * 6 + [10.0] * 2


def test_the_same_weights_are_measured_before_and_after_quantisation() -> None:
    expected = {"stem.weight", "first.weight", "second.weight", "hidden.weight", "fc.weight"}
    network = tiny_residual().eval()
    model = prepare(network, QuantConfig(), SPEC)
    assert set(layer_weights(network)) == set(layer_weights(model)) == expected
    assert {n: w.shape for n, w in layer_weights(network).items()} == {
        n: w.shape for n, w in layer_weights(model).items()
    }


def test_nothing_of_the_network_changes_and_it_repeats() -> None:
    model = quantized()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told: list[tuple[str, int, int]] = []
    options: dict[str, Any] = {"probes": 3, "iterations": 4}
    first = measure_flatness(model, SPEC, batches(), progress=lambda *what: told.append(what), **options)
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {what for what, _, _ in told} == {
        f"{kind} {what}" for kind in ("raw", "filter-normalised") for what in ("eigenvalue", "trace")
    }
    assert told[-1] == ("filter-normalised trace", 3, 3)
    assert measure_flatness(model, SPEC, batches(), **options) == first
    assert measure_flatness(model, SPEC, batches(), seed=1, **options) != first
    whole = measure_flatness(model, SPEC, batches(size=24), **options)
    assert whole.raw.trace == pytest.approx(first.raw.trace, rel=1e-4)  # float32, summed in another order
    assert first.weights == 96 and first.gradient_norm > 0


class OnlyOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0] * ctx.saved_tensors[0]


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = OnlyOnce.apply(x)
        return result


def test_refusals() -> None:
    def refusal(network: nn.Module, **options: int) -> str:
        with pytest.raises(TrainingError) as error:
            measure_flatness(network, SPEC, batches(), **options)
        return str(error.value)

    assert "an operator of the network has no second derivative" in refusal(tiny(Once()))
    assert "probes is 1 and iterations 100; give at least 2 probes" in refusal(tiny(), probes=1)
    assert "no weights of convolutions or linear layers" in refusal(nn.Flatten())
    broken = tiny()
    with torch.no_grad():
        broken.fc.weight.fill_(float("inf"))
    assert "cross entropy is nan; a Hessian needs a finite loss" in refusal(broken)
