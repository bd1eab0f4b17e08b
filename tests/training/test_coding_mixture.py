"""The mixture of experts: against a loop over experts, as a lower bound, and as something to ascend."""

import math

import numpy as np
import pytest
import torch
from coding_witness import (
    SHAPES,
    draw,
    slogdet_rate,
    witness_centre,
    witness_mixture,
)
from torch import Tensor

from mecdeploy.training.coding import (
    capacities,
    coded_dimensions,
    coding_rate_exact,
    coding_rate_moe,
    coding_rate_series,
    normalize_rows,
    scale_rows,
)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("order", [None, 3, 4])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 40), (131, 10), (100, 3)])
@pytest.mark.parametrize("experts", [1, 3, 8])
def test_mixture_is_the_loop_over_experts(
    shape: tuple[int, int], experts: int, order: int | None, center: bool
) -> None:
    rows = scale_rows(draw(*shape, tail=1.5, relu=True), center=False)
    rate = coding_rate_moe(rows, distortion=0.5, experts=experts, order=order, center=center)
    # Both in float64; alternating sums of order 4 lose two digits at most here.
    expected = witness_mixture(rows, 0.5, experts, order, center)
    assert rate.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("samples", [2, 7, 8, 9, 15, 16, 17, 128, 131])
def test_every_row_is_coded_once(samples: int, center: bool) -> None:
    groups = capacities(samples, 8, center=center)
    assert sum(count * capacity for count, capacity in groups) == samples
    assert sum(count for count, _ in groups) == min(8, samples // 2 if center else samples)
    sizes = [capacity for count, capacity in groups for _ in range(count)]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1 + center
    rows = draw(samples, 6).requires_grad_()
    coding_rate_moe(rows, distortion=0.5, experts=8, order=4, center=center).backward()
    assert rows.grad is not None
    assert bool((rows.grad.abs().sum(dim=1) > 0).all())


@pytest.mark.parametrize("shape", [(5, 4), (7, 40), (64, 8), (131, 24), (128, 64)])
@pytest.mark.parametrize("experts", [1, 2, 3, 8, 200])
@pytest.mark.parametrize("tail", [0.0, 3.0])
def test_mixture_is_a_lower_bound_whatever_the_routing(shape: tuple[int, int], experts: int, tail: float) -> None:
    """logdet is concave and sum_k (m_k / m) G_k = G, for equal and for unequal capacities, by energy or at random."""
    for seed in range(3):
        rows = draw(*shape, tail=tail, seed=seed)
        whole = slogdet_rate(rows, 0.5)
        shuffled = torch.from_numpy(np.random.default_rng(seed).random(shape[0]))
        for energy in (None, shuffled):

            def mixture(center: bool, key: torch.Tensor | None = energy, rows: torch.Tensor = rows) -> float:
                rate = coding_rate_moe(rows, distortion=0.5, experts=experts, order=None, center=center, energy=key)
                return rate.item()

            rounding = 1 + 1e-12  # of two determinants in float64
            assert mixture(False) <= whole * rounding
            about_mean = slogdet_rate(rows - rows.mean(dim=0), 0.5)
            assert about_mean <= whole * rounding
            assert mixture(True) <= about_mean * rounding
            if experts == 1:
                assert mixture(False) == pytest.approx(whole, rel=1e-12)
                assert mixture(True) == pytest.approx(about_mean, rel=1e-12)


@pytest.mark.parametrize(("tail", "allowed"), [(0.0, 0.005), (1.0, 0.03), (2.0, 0.2)])
def test_order_four_of_the_mixture_is_near_its_exact_rate(tail: float, allowed: float) -> None:
    """allowed: three times what several draws have on average; one series on the same rows is off five times as far."""
    raw = draw(256, 128, tail=tail, relu=True)
    rows, energy = scale_rows(raw, center=True), raw.square().sum(dim=1)
    series, exact = (
        coding_rate_moe(rows, distortion=0.5, experts=8, order=order, center=True, energy=energy).item()
        for order in (4, None)
    )
    assert abs(series - exact) <= allowed * exact
    one_series = coding_rate_series(rows, distortion=0.5, order=4).item()
    one_exact = coding_rate_exact(rows, distortion=0.5).item()
    assert abs(one_series - one_exact) / one_exact > 5 * abs(series - exact) / exact


def test_contrasts_leave_no_eigenvalue_to_the_mean() -> None:
    """n equal rows about their mean are nothing, and n - 1 orthogonal contrasts are all that is left of n rows."""
    equal = torch.full((8, 5), 3.0, dtype=torch.float64)
    assert coding_rate_moe(equal, distortion=0.5, experts=2, order=4, center=True).abs().item() < 1e-12
    simplex = torch.eye(8, dtype=torch.float64)
    # About its mean the simplex is isotropic in 7 dimensions: a series about the one eigenvalue 8 / (8 eps^2) is exact.
    rate = coding_rate_moe(simplex, distortion=0.5, experts=1, order=1, center=True)
    assert rate.item() == pytest.approx(7 / 2 * math.log(3), rel=1e-12)


def test_mixture_gradient_is_the_truncated_resolvent() -> None:
    """dR/dZ_k = (m_k / m) a P(G_k) Z_k with P the derivative of the series, mu_k held: numpy, expert by expert."""
    rows = scale_rows(draw(14, 9, tail=1.0), center=False).requires_grad_()
    coding_rate_moe(rows, distortion=0.5, experts=4, order=4).backward()
    assert rows.grad is not None
    values = rows.detach().numpy()
    by_energy = np.argsort((values**2).sum(axis=1))
    expected = np.zeros_like(values)
    for chosen in np.split(by_energy, [3, 6, 10]):
        own = values[chosen]
        scale = 9 / (len(chosen) * 0.5)
        gram = scale * own @ own.T
        centre = witness_centre(np.linalg.eigvalsh(gram))
        x = (gram - centre * np.eye(len(chosen))) / (1 + centre)
        resolvent = sum((-1) ** j * np.linalg.matrix_power(x, j) for j in range(4)) / (1 + centre)
        expected[chosen] = len(chosen) / 14 * scale * resolvent @ own
    np.testing.assert_allclose(rows.grad.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_coded_dimensions_counts_eigenvalues() -> None:
    assert coded_dimensions(128, 64) == 64
    assert coded_dimensions(20, 64) == 20
    assert coded_dimensions(128, 64, experts=8) == 16
    assert coded_dimensions(256, 16, experts=8) == 16
    assert coded_dimensions(128, 64, experts=8, center=True) == 15
    assert coded_dimensions(1, 64, center=True) == 1
    assert coded_dimensions(10, 64, experts=4) == pytest.approx((2 * 2 * 2 + 2 * 3 * 3) / 10)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradients_agree_with_finite_differences() -> None:
    rows, other = draw(6, 4).requires_grad_(), (draw(6, 4) + 0.1 * draw(6, 4, seed=1)).requires_grad_()
    centre = torch.tensor(2.0, dtype=torch.float64)

    def exact(z: Tensor) -> Tensor:
        return coding_rate_exact(z, distortion=0.5)

    def exact_of_two(z: Tensor, w: Tensor) -> Tensor:
        return coding_rate_exact(z, distortion=0.5, other=w)

    def series(z: Tensor) -> Tensor:
        return coding_rate_series(z, distortion=0.5, order=4, centre=centre)

    def series_of_two(z: Tensor, w: Tensor) -> Tensor:
        return coding_rate_series(z, distortion=0.5, order=5, centre=centre, other=w)

    def mixture_exact(z: Tensor) -> Tensor:
        return coding_rate_moe(scale_rows(z, center=True), distortion=0.5, experts=3, order=None, center=True)

    def normalized(z: Tensor) -> Tensor:
        return coding_rate_exact(normalize_rows(z, center=True), distortion=0.5)

    for function in (exact, series, mixture_exact):
        assert torch.autograd.gradcheck(function, (rows,))
    for function in (exact_of_two, series_of_two):
        assert torch.autograd.gradcheck(function, (rows, other))
    # The divisor by the largest entry is held, which costs the share of NOISE, 1e-8 x d / energy.
    assert torch.autograd.gradcheck(normalized, (rows,), rtol=1e-3, atol=1e-5)


def effective_rank(rows: Tensor) -> float:
    share = torch.linalg.svdvals(rows.detach().double()).square()
    share = share / share.sum()
    return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))


@pytest.mark.parametrize("form", ["exact", "mixture"])
def test_ascent_spreads_nearly_collapsed_features(form: str) -> None:
    rows = (draw(32, 1) @ draw(1, 8) + 0.05 * draw(32, 8)).float().requires_grad_()
    before = effective_rank(rows)
    for _ in range(100):
        scaled = scale_rows(rows, center=True)
        if form == "exact":
            rate = coding_rate_exact(scaled, distortion=0.5)
        else:
            rate = coding_rate_moe(scaled, distortion=0.5, experts=4, order=4, center=True)
        (gradient,) = torch.autograd.grad(rate, rows)
        rows = (rows + 3 * gradient).detach().requires_grad_()
    assert before < 2
    assert effective_rank(rows) > 5
