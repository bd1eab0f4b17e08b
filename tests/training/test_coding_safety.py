"""Scaling of rows, and what floats can do to a rate: zero, huge and broken values, every precision, no host."""

import math

import numpy as np
import pytest
import torch
from coding_witness import (
    draw,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mecdeploy.training.coding import (
    coding_rate_exact,
    coding_rate_moe,
    coding_rate_series,
    normalize_rows,
    scale_rows,
)


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
