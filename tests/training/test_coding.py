"""Exact and series rates of one view and of two, against numpy."""

import math

import numpy as np
import pytest
import torch
from coding_witness import (
    SHAPES,
    draw,
    slogdet_rate,
    spectra,
    with_spectrum,
    witness_centre,
    witness_series,
)
from torch import Tensor

from mecdeploy.training.coding import (
    DISAGREEMENT,
    REACH,
    coding_rate_exact,
    coding_rate_moe,
    coding_rate_series,
    normalize_rows,
    scale_rows,
    series_centre,
    series_logdet,
)

FLOAT32_STEP = float(np.finfo(np.float32).eps)


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


def test_the_centre_takes_no_gradient() -> None:
    """Its derivative is the truncation error's, which may point anywhere."""
    centre = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    gram = with_spectrum(spectra()["flat"]).requires_grad_()
    series_logdet(gram, centre, order=4).backward()
    assert centre.grad is None and gram.grad is not None


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
