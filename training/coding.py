"""Coding rates of row matrices: exact, by one Taylor series, and by a mixture of experts with one series each.

Everything here is a pure function of float tensors and is differentiable in its rows. The rate of m rows Z [m, d] at
distortion eps^2, in nats per row, is

    R(Z) = 1/2 logdet(I + G),    G = d / (m eps^2) Z Z^T    (or Z^T Z: the same determinant, the smaller side is used).

Source of the rate: Ma et al. 2007, "Segmentation of multivariate mixed data via lossy data coding and compression".
Source of the series and of two views: Liu et al. 2022 (arXiv:2210.11464). The mixture, its centres and the symmetric
two-view matrix are our reading of arXiv:2509.15514, whose text we do not have: docs/mec-quant.md derives them.

All functions compute in float32 (float64 when given float64), whatever autocast says, and never wait for the device,
but for the exact rate of two views, which needs an eigendecomposition.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

REACH = 0.9
"""How far above its centre a series may be asked to go, in units of its radius of convergence."""

SMALLEST = 1e-12
"""A tensor whose largest entry is smaller, in real units, is not scaled up: its gradient would grow without bound."""

NOISE = 1e-8
"""Mean square, relative to the largest entry squared, under which variation is not scaled up to unit RMS.

Far over float32 rounding (1e-14), and no more than one 8-bit step in one entry of a thousand (1.5e-8)."""

DIRECTIONLESS = 1e-4
"""Row energy, relative to the mean row's, under which a row is too near the origin to have a direction."""

DISAGREEMENT = 0.1
"""1 + eigenvalue below which the exact rate of two views goes on as a straight line, of slope 1 / DISAGREEMENT."""

Parameters = ParamSpec("Parameters")


def _in_full_precision(
    function: Callable[Concatenate[Tensor, Parameters], Tensor],
) -> Callable[Concatenate[Tensor, Parameters], Tensor]:
    @wraps(function)
    def without_autocast(rows: Tensor, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            return function(_widen(rows), *args, **kwargs)

    return without_autocast


def _widen(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _for_factorising(rows: Tensor) -> Tensor:
    # Apple's GPUs have no float64; I + G has no eigenvalue under 1, so that float32 still factorises it.
    return rows if rows.device.type == "mps" else rows.double()


@_in_full_precision
def scale_rows(rows: Tensor, /, *, center: bool) -> Tensor:
    """Divide by the RMS row norm, so that growing a tensor does not grow its rate; optionally subtract the mean row.

    rows: [m, d]. Returns [m, d] with mean row energy 1 (0 for a constant tensor). The largest entry is divided out
    first, so that squares neither overflow nor vanish. Variation under NOISE is left small instead of being blown up.
    """
    rows = _bounded(rows, center)
    return rows * (rows.shape[-1] * (rows.square().mean() + NOISE)).rsqrt()


@_in_full_precision
def normalize_rows(rows: Tensor, /, *, center: bool) -> Tensor:
    """Divide every row by its own L2 norm, as the two-view rate of arXiv:2210.11464 wants; optionally center first.

    rows: [m, d]. Returns [m, d] with row energies 1, less for a row under DIRECTIONLESS of the mean energy, and 0 for a
    row of zeros.
    """
    rows = _bounded(rows, center)
    energy = rows.square().sum(dim=-1, keepdim=True)
    return rows * (energy + DIRECTIONLESS * energy.mean() + rows.shape[-1] * NOISE).rsqrt()


def _bounded(rows: Tensor, center: bool) -> Tensor:
    # What follows is scale invariant, so that the gradient through this divisor is zero: it is left out.
    rows = rows / rows.detach().abs().amax().clamp_min(SMALLEST)
    return rows - rows.mean(dim=0, keepdim=True) if center else rows


def _gram(rows: Tensor, other: Tensor | None, distortion: float) -> Tensor:
    """G on the smaller side for one view [..., min(m, d), min(m, d)], on the sample side for two [..., m, m]."""
    samples, dimension = rows.shape[-2:]
    if other is not None:
        product = rows @ other.mT
        product = (product + product.mT) / 2
    else:
        product = rows @ rows.mT if samples <= dimension else rows.mT @ rows
    return product * (dimension / (samples * distortion))


@_in_full_precision
def coding_rate_exact(rows: Tensor, /, *, distortion: float, other: Tensor | None = None) -> Tensor:
    """R(Z) = 1/2 logdet(I + G), in nats, by Cholesky in float64.

    rows: [..., m, d], scaled. other: the second view, [..., m, d]; then G = d / (m eps^2) (Z1 Z2^T + Z2 Z1^T) / 2,
    whose eigenvalues are real but may be negative: below DISAGREEMENT - 1 the logarithm goes on as its tangent, so
    that the rate is finite, concave and increasing in every eigenvalue. Returns [...].
    Source: Ma et al. 2007; two views after arXiv:2210.11464, made symmetric by us.
    """
    wide = _for_factorising(rows)
    if other is None:
        return (_logdet(_gram(wide, None, distortion)) / 2).to(rows.dtype)
    second = _for_factorising(_widen(other.to(rows.device)))
    return (_extended_logdet(_gram(wide, second, distortion)) / 2).to(rows.dtype)


def _logdet(gram: Tensor) -> Tensor:
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(identity + gram)  # unlike cholesky, does not wait to look for errors
    logarithms: Tensor = factor.diagonal(dim1=-2, dim2=-1).log()
    return 2 * logarithms.sum(dim=-1)


def _extended_logdet(gram: Tensor) -> Tensor:
    # The gradient of a spectral sum is f'(G): taken from the eigenvectors it stays finite where eigenvalues coincide.
    with torch.no_grad():
        eigenvalues, vectors = torch.linalg.eigh(torch.nan_to_num(gram))
        shifted = 1 + eigenvalues
        inside = shifted.clamp_min(DISAGREEMENT)
        value = (inside.log() + (shifted - inside) / DISAGREEMENT).sum(dim=-1)
        slope = (vectors / inside.unsqueeze(-2)) @ vectors.mT
    extended: Tensor = value + (slope * (gram - gram.detach())).sum(dim=(-2, -1))
    return extended


@torch.no_grad()
def series_centre(gram: Tensor, /) -> Tensor:
    """Where to put the centre mu of a Taylor series of logdet(I + G), so that it converges whatever the spectrum.

    gram: [..., r, r], symmetric. Returns [...] >= 0, without gradient:

        mu = max(mean, (bound - REACH) / (1 + REACH), 0),   bound = mean + (tr (G - mean I)^4)^(1/4),   mean = tr G / r

    The bound is never under the largest eigenvalue, and exact for r = 1 and for multiples of I. Every eigenvalue lies
    within REACH (1 + mu) above mu; below, the radius 1 + mu reaches to -1, and G has no eigenvalue under 0. A
    narrow spectrum gets its mean, about which tr X is 0 and tr X^2 least. Our own derivation.
    """
    size = gram.shape[-1]
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    deviation = gram - mean[..., None, None] * torch.eye(size, dtype=gram.dtype, device=gram.device)
    largest = deviation.abs().amax(dim=(-2, -1)).clamp_min(torch.finfo(gram.dtype).tiny)
    deviation = deviation / largest[..., None, None]
    bound = mean + largest * (deviation @ deviation).square().sum(dim=(-2, -1)).pow(0.25)
    return torch.maximum(mean, (bound - REACH) / (1 + REACH)).clamp_min(0)


def series_logdet(gram: Tensor, centre: Tensor, /, *, order: int) -> Tensor:
    """Taylor polynomial of logdet(I + G) about G = mu I: r log(1 + mu) + sum_j (-1)^(j+1)/j tr X^j, j = 1..order.

    gram: [..., r, r], symmetric. centre: mu, [...], not differentiated. X = (G - mu I) / (1 + mu). Returns [...].
    Only the powers up to half the order are formed: tr X^(a+b) = <X^a, X^b>. With mu from series_centre the gradient
    in G is positive semidefinite at any order and for any symmetric G, so that ascent never shrinks an eigenvalue.
    At centre 0 and order 4 this is the series of arXiv:2210.11464.
    """
    size = gram.shape[-1]
    centre = centre.detach()
    shift = centre[..., None, None] * torch.eye(size, dtype=gram.dtype, device=gram.device)
    first = (gram - shift) / (1 + centre[..., None, None])
    powers = [first]
    value = size * torch.log1p(centre) + first.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    for degree in range(2, order + 1):
        half = degree // 2
        if degree - half > len(powers):
            powers.append(powers[-1] @ first)
        trace = (powers[half - 1] * powers[degree - half - 1]).sum(dim=(-2, -1))
        value = value - (-1) ** degree / degree * trace
    return value


@_in_full_precision
def coding_rate_series(
    rows: Tensor, /, *, distortion: float, order: int, centre: Tensor | None = None, other: Tensor | None = None
) -> Tensor:
    """R(Z) by one Taylor series about centre (by default series_centre's), in nats.

    rows, other: [..., m, d], scaled; other as in coding_rate_exact. centre: [...]. Returns [...].
    """
    gram = _gram(rows, None if other is None else other.to(rows), distortion)
    return series_logdet(gram, series_centre(gram) if centre is None else centre.to(gram), order=order) / 2


@_in_full_precision
def coding_rate_moe(
    rows: Tensor,
    /,
    *,
    distortion: float,
    experts: int,
    order: int | None,
    center: bool = False,
    energy: Tensor | None = None,
    other: Tensor | None = None,
) -> Tensor:
    """R_moe = sum_k (m_k / m) R(Z_k) over K experts that share the rows by energy; a lower bound of R(Z), in nats.

    rows: [m, d], scaled. order: of each expert's series about its own centre; None codes each expert exactly, and then
    R_moe <= R(Z) holds for one view, whatever the routing and the capacities. center: each expert subtracts its own
    mean row (the bound holds, of the centered rows too). energy: routing key [m]; by default a row's squared norm (two
    views: the product of both rows'). other: the second view, [m, d], routed along.

    Rows are sorted by energy, ties in their order, and cut into runs by capacities(): every row is coded, and no shape
    depends on data. Returns []. Source: our reading of arXiv:2509.15514 (docs/mec-quant.md).
    """
    second = None if other is None else other.to(rows)
    if energy is None:
        energy = rows.detach().square().sum(dim=-1)
        energy = energy if second is None else energy * second.detach().square().sum(dim=-1)
    routed = torch.argsort(energy.detach().to(rows.device), stable=True)
    total = rows.sum() * 0  # what one row about its own mean has to say
    samples, dimension = rows.shape
    start = 0
    for group, capacity in capacities(samples, experts, center=center):
        chosen = routed[start : start + group * capacity]
        start += group * capacity
        if center and capacity == 1:
            continue
        own = _expert_rows(rows[chosen].view(group, capacity, dimension), center)
        paired = None if second is None else _expert_rows(second[chosen].view(group, capacity, dimension), center)
        # Contrasts are one row fewer, of the same scatter: G is still that of m_k rows.
        level = distortion * capacity / own.shape[-2]
        if order is None:
            rates = coding_rate_exact(own, distortion=level, other=paired)
        else:
            rates = coding_rate_series(own, distortion=level, order=order, other=paired)
        total = total + rates.sum() * (capacity / samples)
    return total


def _expert_rows(rows: Tensor, center: bool) -> Tensor:
    """Rows [K, n, d] as they are, or [K, n - 1, d]: about their mean, without the eigenvalue 0 that centering leaves.

    Helmert's contrasts H [n - 1, n] have orthonormal rows, all orthogonal to 1: (H Z)^T H Z is the scatter of Z about
    its mean row. A series would have to spend its order on that eigenvalue, the farthest below its centre.
    """
    if not center:
        return rows
    count = rows.shape[-2]
    place = torch.arange(1, count, dtype=rows.dtype, device=rows.device).unsqueeze(-1)
    contrasts = torch.ones(count - 1, count, dtype=rows.dtype, device=rows.device).tril()
    contrasts = contrasts - torch.diag_embed(place.squeeze(-1), offset=1)[:-1]
    return (contrasts * (place * (place + 1)).rsqrt()) @ rows


def capacities(samples: int, experts: int, *, center: bool = False) -> list[tuple[int, int]]:
    """How m rows are shared: (number of experts, rows of each), low energies first; one group if K divides m.

    K is lowered to leave each expert a row, or two where it subtracts its mean. All capacities are within one row.
    """
    experts = max(1, min(experts, samples // 2 if center else samples))
    capacity, remainder = divmod(samples, experts)
    groups = [(experts - remainder, capacity), (remainder, capacity + 1)]
    return [group for group in groups if group[0]]


def coded_dimensions(samples: int, dimension: int, *, experts: int = 1, center: bool = False) -> float:
    """The number of eigenvalues a rate sums over, sum_k (m_k / m) min(m_k, d): what to divide it by; at least 1.

    center: of m_k - 1 contrasts. A rate over this number is in nats per coded dimension, and its gradient per row has
    the same size in every layer.
    """
    shares = (
        group * capacity * min(capacity - center, dimension)
        for group, capacity in capacities(samples, experts, center=center)
    )
    return max(1.0, sum(shares) / samples)
