"""Coding rates against numpy: slogdet, eigenvalues and plain loops in float64, which share no code with ours."""

import math
import zlib

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mecdeploy.training.coding import (
    DISAGREEMENT,
    REACH,
    capacities,
    coded_dimensions,
    coding_rate_exact,
    coding_rate_moe,
    coding_rate_series,
    normalize_rows,
    scale_rows,
    series_centre,
    series_logdet,
)

SHAPES = [(1, 1), (1, 7), (7, 1), (2, 3), (12, 5), (5, 12), (33, 16), (64, 64)]
FLOAT32_STEP = float(np.finfo(np.float32).eps)


def draw(rows: int, columns: int, *, tail: float = 0.0, relu: bool = False, seed: int = 0) -> Tensor:
    """float64 rows, Gaussian or after ReLU, with row energies exp(tail * N(0, 1))."""
    random = np.random.default_rng([seed, rows, columns, zlib.crc32(str((tail, relu)).encode())])
    values = random.standard_normal((rows, columns))
    values = np.maximum(values, 0) if relu else values
    return torch.from_numpy(values * np.exp(tail / 2 * random.standard_normal((rows, 1))))


def slogdet_rate(rows: Tensor, distortion: float) -> float:
    """Ma et al.'s R(Z), on the feature side whatever the shape."""
    values = rows.detach().double().numpy()
    samples, dimension = values.shape
    gram = np.eye(dimension) + dimension / (samples * distortion) * values.T @ values
    sign, logarithm = np.linalg.slogdet(gram)
    assert sign == 1
    return float(logarithm / 2)


def witness_centre(eigenvalues: np.ndarray) -> float:
    mean = eigenvalues.mean()
    bound = mean + ((eigenvalues - mean) ** 4).sum() ** 0.25
    return float(max(mean, (bound - REACH) / (1 + REACH), 0.0))


def witness_series(eigenvalues: np.ndarray, centre: float, order: int) -> float:
    total = 0.0
    for eigenvalue in eigenvalues:
        total += math.log1p(centre)
        for j in range(1, order + 1):
            total += (-1) ** (j + 1) / j * ((eigenvalue - centre) / (1 + centre)) ** j
    return total


def witness_mixture(rows: Tensor, distortion: float, experts: int, order: int | None, center: bool = False) -> float:
    """The mixture as a loop over experts: sort in Python, cut by hand, subtract the mean, numpy for each."""
    values = rows.detach().double().numpy()
    samples, dimension = values.shape
    by_energy = sorted(range(samples), key=lambda row: float((values[row] ** 2).sum()))
    experts = max(1, min(experts, samples // 2 if center else samples))
    larger = samples % experts
    total = 0.0
    for expert in range(experts):
        take = samples // experts + (1 if expert >= experts - larger else 0)
        chosen, by_energy = by_energy[:take], by_energy[take:]
        own = values[chosen] - (values[chosen].mean(axis=0) if center else 0)
        if order is None:
            total += take / samples * slogdet_rate(torch.from_numpy(own), distortion)
            continue
        # All d eigenvalues; the zeros that only a lack of rows explains (m_k, or m_k - 1 about the mean) are not coded.
        eigenvalues = np.linalg.eigvalsh(dimension / (take * distortion) * own.T @ own)
        eigenvalues = eigenvalues[::-1][: min(take - center, dimension)]
        if not len(eigenvalues):
            continue
        total += take / samples * witness_series(eigenvalues, witness_centre(eigenvalues), order) / 2
    assert not by_energy
    return total


# --- the exact rate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distortion", [1e-3, 0.5, 64.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_rate_is_slogdet(shape: tuple[int, int], distortion: float) -> None:
    rows = draw(*shape, tail=1.0)
    # Two float64 factorisations of a matrix with condition number up to 1e6.
    assert coding_rate_exact(rows, distortion=distortion).item() == pytest.approx(
        slogdet_rate(rows, distortion), rel=1e-9
    )
    single = rows.float()
    rate = coding_rate_exact(single, distortion=distortion)
    assert rate.dtype == torch.float32
    # Computed in float64 from the same float32 rows, rounded once at the end.
    assert rate.item() == pytest.approx(slogdet_rate(single, distortion), rel=FLOAT32_STEP)


def test_exact_rate_of_orthogonal_rows_has_a_closed_form() -> None:
    """m orthonormal rows of dimension d: m eigenvalues d / (m eps^2)."""
    rows = torch.eye(6, 10, dtype=torch.float64)
    expected = 6 / 2 * math.log(1 + 10 / (6 * 0.5))
    assert coding_rate_exact(rows, distortion=0.5).item() == pytest.approx(expected, rel=1e-14)


def test_exact_rate_of_batches_is_the_rate_of_each() -> None:
    batch = torch.stack([draw(5, 8, seed=seed) for seed in range(3)])
    each = torch.stack([coding_rate_exact(rows, distortion=0.5) for rows in batch])
    # Batched and single products may sum in another order.
    np.testing.assert_allclose(coding_rate_exact(batch, distortion=0.5), each, rtol=1e-13)


# --- one series -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_series_is_the_sum_over_eigenvalues(shape: tuple[int, int], order: int) -> None:
    rows = draw(*shape, tail=1.0)
    samples, dimension = shape
    product = (rows @ rows.T if samples <= dimension else rows.T @ rows).numpy()
    eigenvalues = np.linalg.eigvalsh(product * dimension / (samples * 0.5))
    for centre in (0.0, 3.0, witness_centre(eigenvalues)):
        value = coding_rate_series(rows, distortion=0.5, order=order, centre=torch.tensor(centre, dtype=torch.float64))
        # A sum of alternating terms, the largest of which sets the rounding error; the two compute in float64.
        largest = max(1.0, float(np.abs((eigenvalues - centre) / (1 + centre)).max()) ** order)
        expected = witness_series(eigenvalues, centre, order) / 2
        assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-12 * largest * len(eigenvalues))


def test_series_at_centre_zero_is_the_four_terms_of_mec() -> None:
    """C - C^2/2 + C^3/3 - C^4/4 under the trace, as arXiv:2210.11464 has it, for one view and for two."""
    first, second = normalize_rows(draw(9, 20), center=False), normalize_rows(draw(9, 20, seed=1), center=False)
    for other in (None, second):
        c = (first @ (first if other is None else other).T).numpy() * 20 / (9 * 64.0)
        c = (c + c.T) / 2
        powers = [np.linalg.matrix_power(c, j) for j in (1, 2, 3, 4)]
        expected = np.trace(powers[0] - powers[1] / 2 + powers[2] / 3 - powers[3] / 4) / 2
        rate = coding_rate_series(first, distortion=64.0, order=4, centre=torch.zeros(()), other=other)
        assert rate.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tail", [0.0, 2.0])
def test_series_converges_about_its_centre_whatever_the_tail(tail: float) -> None:
    rows = scale_rows(draw(32, 48, tail=tail, relu=True), center=False)
    exact = slogdet_rate(rows, 0.5)
    errors = [abs(coding_rate_series(rows, distortion=0.5, order=order).item() - exact) for order in (4, 32, 256, 2048)]
    assert errors == sorted(errors, reverse=True)
    # The slowest factor is mu / (1 + mu), mu some 140 at the longest tail: 1e-6 to the power 2048.
    assert errors[-1] < 1e-4 * exact


def test_series_about_the_mean_diverges_on_long_tails_where_the_centre_is_safe() -> None:
    """What the design measured: one series of order 4 is off by far more than the rate itself."""
    rows = scale_rows(draw(256, 512, tail=2.0, relu=True), center=False)
    exact = slogdet_rate(rows, 0.5)
    gram = rows @ rows.T * 512 / (256 * 0.5)
    about_mean = coding_rate_series(rows, distortion=0.5, order=4, centre=gram.diagonal().mean()).item()
    assert abs(about_mean - exact) > 100 * exact


def spectra() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    return {
        "zero": np.zeros(5),
        "flat": np.full(6, 7.0),
        "one": np.array([11.0]),
        "one large": np.array([1e3] + [0.0] * 31),
        "two levels": np.array([40.0] * 4 + [0.1] * 12),
        "log-normal": np.exp(3 * random.standard_normal(32)),
        "huge": np.exp(random.standard_normal(32)) * 1e12,
        "tiny": np.exp(random.standard_normal(32)) * 1e-20,
        "signed": 30 * random.standard_normal(24),
        "negative": -np.exp(2 * random.standard_normal(24)),
    }


def with_spectrum(eigenvalues: np.ndarray) -> Tensor:
    basis, _ = np.linalg.qr(np.random.default_rng(4).standard_normal((len(eigenvalues),) * 2))
    return torch.from_numpy(basis * eigenvalues @ basis.T)


@pytest.mark.parametrize("name", spectra())
def test_centre_keeps_every_eigenvalue_within_reach(name: str) -> None:
    eigenvalues = spectra()[name]
    for dtype, rounding in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        centre = series_centre(with_spectrum(eigenvalues).to(dtype)).item()
        assert centre >= 0
        # Rounding of the matrix itself moves its eigenvalues by some r float steps of the largest.
        assert (eigenvalues.max() - centre) / (1 + centre) <= REACH + rounding
        assert centre == pytest.approx(witness_centre(eigenvalues), rel=rounding * 10, abs=1e-6)


def test_centre_of_a_narrow_spectrum_is_its_mean() -> None:
    eigenvalues = np.linspace(9.0, 11.0, 8)
    assert series_centre(with_spectrum(eigenvalues)).item() == pytest.approx(10.0, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", spectra())
def test_ascent_never_shrinks_an_eigenvalue(name: str, order: int) -> None:
    """The gradient in G is positive semidefinite, for every spectrum, negative ones too."""
    gram = with_spectrum(spectra()[name]).requires_grad_()
    series_logdet(gram, series_centre(gram), order=order).backward()
    assert gram.grad is not None
    eigenvalues = np.linalg.eigvalsh(gram.grad.numpy())
    # A polynomial of X, whose entries reach |X|^(order - 1): rounding is relative to the largest.
    assert eigenvalues.min() >= -1e-9 * max(1e-300, eigenvalues.max())


def test_even_order_about_the_mean_would_shrink_the_largest() -> None:
    """What the centre prevents: the sign check above can fail."""
    gram = with_spectrum(spectra()["log-normal"]).requires_grad_()
    series_logdet(gram, gram.detach().diagonal().mean(), order=4).backward()
    assert gram.grad is not None
    assert np.linalg.eigvalsh(gram.grad.numpy()).min() < 0


# --- the mixture ------------------------------------------------------------------------------------------------------


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


# --- scaling of rows --------------------------------------------------------------------------------------------------


def test_scaled_rows_have_unit_mean_energy_and_no_mean() -> None:
    rows = scale_rows(draw(20, 7, tail=2.0) + 5, center=True)
    # NOISE is 1e-8 of the largest entry squared, some hundred times the mean square here.
    assert rows.square().sum(dim=1).mean().item() == pytest.approx(1, rel=1e-5)
    assert rows.mean(dim=0).abs().max().item() < 1e-12
    unit = normalize_rows(draw(20, 7), center=False).square().sum(dim=1)
    np.testing.assert_allclose(unit, 1, rtol=1e-2)  # DIRECTIONLESS takes 1e-4 of a mean row


@pytest.mark.parametrize("factor", [2.0**-30, 0.37, 2.0**20, 1e30])
@pytest.mark.parametrize("center", [False, True])
def test_growing_the_tensor_wins_nothing(factor: float, center: bool) -> None:
    rows = draw(33, 16, tail=1.0, relu=True).requires_grad_()
    grown = (rows.detach() * factor).requires_grad_()
    rates = [
        coding_rate_moe(scale_rows(each, center=center), distortion=0.5, experts=8, order=4, center=center)
        for each in (rows, grown)
    ]
    assert rates[0].item() == pytest.approx(rates[1].item(), rel=1e-12)
    rates[0].backward()
    assert rows.grad is not None
    # Nothing to gain along the tensor itself, but for the 1e-8 of NOISE.
    assert abs((rows.grad * rows).sum().item()) < 1e-5 * (rows.grad.norm() * rows.norm()).item()


def test_order_of_rows_and_choice_of_axes_do_not_matter() -> None:
    rows = scale_rows(draw(37, 12, tail=1.0), center=True)
    order = torch.from_numpy(np.random.default_rng(0).permutation(37))
    axes = torch.from_numpy(np.linalg.qr(np.random.default_rng(1).standard_normal((12, 12)))[0])
    expected = coding_rate_moe(rows, distortion=0.5, experts=8, order=4, center=True).item()
    for changed in (rows[order], rows @ axes):
        rate = coding_rate_moe(changed, distortion=0.5, experts=8, order=4, center=True).item()
        assert rate == pytest.approx(expected, rel=1e-11)  # sums in another order, float64


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


# --- two views --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [None, 4])
def test_two_equal_views_are_one_and_two_views_are_symmetric(order: int | None) -> None:
    first = normalize_rows(draw(29, 40), center=True)
    second = normalize_rows(draw(29, 40) + 0.5 * draw(29, 40, seed=1), center=True)

    def rate(rows: Tensor, other: Tensor | None) -> float:
        return coding_rate_moe(rows, distortion=0.5, experts=4, order=order, other=other).item()

    assert rate(first, first) == pytest.approx(rate(first, None), rel=1e-11)
    assert rate(first, second) == pytest.approx(rate(second, first), rel=1e-12)
    assert rate(first, second) < rate(first, first)


@pytest.mark.parametrize("order", [None, 1, 2, 3, 4])
def test_every_view_is_pulled_towards_the_other(order: int | None) -> None:
    """The gradient in Z1 is P Z2, P positive definite: even opposite views are drawn together."""
    for agreement in (-1.0, 0.0, 1.0):
        second = normalize_rows(draw(30, 20, seed=2), center=False)
        first = normalize_rows(agreement * second + draw(30, 20, seed=3), center=False).requires_grad_()
        coding_rate_moe(first, distortion=0.5, experts=4, order=order, other=second).backward()
        assert first.grad is not None
        assert (first.grad * second).sum().item() > 0


def test_exact_rate_of_two_views_is_a_lower_bound_of_mec() -> None:
    """Ostrowski-Taussky: det of the symmetric part is at most |det|, where the symmetric part is definite."""
    first = normalize_rows(draw(12, 30), center=False)
    second = normalize_rows(first + 0.05 * draw(12, 30, seed=1), center=False)
    cross = np.eye(12) + (first @ second.T).numpy() * 30 / (12 * 0.5)
    assert np.linalg.eigvalsh((cross + cross.T) / 2).min() > DISAGREEMENT
    symmetric = np.linalg.slogdet((cross + cross.T) / 2)[1] / 2
    rate = coding_rate_exact(first, distortion=0.5, other=second).item()
    assert rate == pytest.approx(symmetric, rel=1e-12)
    assert rate < np.linalg.slogdet(cross)[1] / 2


def test_exact_rate_of_opposite_views_goes_on_as_a_line() -> None:
    first = torch.eye(3, dtype=torch.float64)
    rate = coding_rate_exact(first, distortion=0.5, other=-first)
    expected = 3 / 2 * (math.log(DISAGREEMENT) + (1 - 2.0 - DISAGREEMENT) / DISAGREEMENT)
    assert rate.item() == pytest.approx(expected, rel=1e-12)


# --- safety -----------------------------------------------------------------------------------------------------------


def awkward() -> dict[str, Tensor]:
    base = draw(13, 6, relu=True).float()
    outlier = base.clone()
    outlier[3, 2] = 1e20
    largest = torch.finfo(torch.float32).max
    return {
        "zero": torch.zeros(13, 6),
        "constant": torch.full((13, 6), 0.3),
        "huge": base * 1e30,
        "largest": torch.full((13, 6), largest) * torch.sign(base - 0.5),
        "tiny": base * 1e-30,
        "denormal": base * 1e-41,
        "outlier": outlier,
        "one row": base[:1],
        "two rows": base[:2],
        "one column": base[:, :1],
        "one entry": base[:1, :1],
        "equal rows": base[:1].repeat(13, 1),
        "fewer rows than experts": base[:5],
        "nearly constant": 0.3 + 1e-7 * base,
        "one row of many": torch.cat([base[:1], torch.zeros(12, 6)]),
    }


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", awkward())
def test_values_and_gradients_stay_finite_in_float32(name: str, center: bool) -> None:
    for views in (1, 2):
        for form in ("exact", "series", "mixture"):
            rows = awkward()[name].requires_grad_()
            other = None if views == 1 else normalize_rows(-rows.flip(0), center=center)
            scaled = (scale_rows if views == 1 else normalize_rows)(rows, center=center)
            if form == "mixture":
                rate = coding_rate_moe(scaled, distortion=0.5, experts=8, order=4, center=center, other=other)
            elif form == "series":
                rate = coding_rate_series(scaled, distortion=0.5, order=4, other=other)
            else:
                rate = coding_rate_exact(scaled, distortion=0.5, other=other)
            rate.backward()
            assert rows.grad is not None
            assert bool(rate.isfinite()) and bool(rows.grad.isfinite().all()), (views, form)


@pytest.mark.parametrize("distortion", [1e-6, 1e6])
def test_extreme_distortion_stays_finite_in_float32(distortion: float) -> None:
    rows = draw(64, 512, tail=3.0).float().requires_grad_()
    rate = coding_rate_moe(scale_rows(rows, center=True), distortion=distortion, experts=8, order=4, center=True)
    rate.backward()
    assert rows.grad is not None
    assert bool(rate.isfinite()) and bool(rows.grad.isfinite().all())


def test_constant_rows_have_no_rate_and_no_gradient() -> None:
    for rows in (torch.zeros(9, 4), torch.full((9, 4), 0.3), torch.full((1, 4), 2.0)):
        rows = rows.requires_grad_()
        rate = coding_rate_moe(scale_rows(rows, center=True), distortion=0.5, experts=4, order=4, center=True)
        rate.backward()
        assert rows.grad is not None
        # float32 rounding of the mean leaves 1e-7 of the entries, which NOISE keeps at 1e-3 of a unit row.
        assert abs(rate.item()) < 1e-4
        assert rows.grad.abs().max().item() < 1


@pytest.mark.parametrize("other", [False, True])
def test_not_a_number_is_passed_on_and_not_hidden(other: bool) -> None:
    rows = draw(8, 4)
    rows[2, 1] = math.nan
    second = draw(8, 4) if other else None
    assert math.isnan(coding_rate_exact(rows, distortion=0.5, other=second).item())
    assert math.isnan(coding_rate_moe(rows, distortion=0.5, experts=2, order=4, other=second).item())


def test_autocast_and_half_precision_change_nothing_but_the_input() -> None:
    rows = draw(40, 24, tail=1.0).to(torch.bfloat16)

    def rates(values: Tensor) -> Tensor:
        scaled, unit = scale_rows(values, center=True), normalize_rows(values, center=True)
        return torch.stack(
            [
                coding_rate_moe(scaled, distortion=0.5, experts=8, order=4),
                coding_rate_exact(scaled, distortion=0.5),
                coding_rate_exact(unit, distortion=0.5, other=unit.flip(0).bfloat16()),
            ]
        )

    expected = rates(rows.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = rates(rows)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, expected) and torch.equal(rates(rows), expected)


def test_same_rows_same_bits() -> None:
    rows = draw(131, 24, tail=2.0, relu=True).float()
    rates = {
        coding_rate_moe(scale_rows(rows, center=True), distortion=0.5, experts=8, order=4).item() for _ in range(5)
    }
    assert len(rates) == 1


def test_nothing_depends_on_values_but_values() -> None:
    """With no storage behind the tensors, an .item() or a data-dependent shape is refused by torch itself."""
    with FakeTensorMode():
        rows = torch.empty(130, 24, requires_grad=True)
        coding_rate_moe(scale_rows(rows, center=True), distortion=0.5, experts=8, order=4, center=True).backward()
        coding_rate_moe(rows, distortion=0.5, experts=8, order=4, other=normalize_rows(rows, center=True)).backward()
        coding_rate_exact(rows, distortion=0.5).backward()
        assert rows.grad is not None and rows.grad.shape == (130, 24)
