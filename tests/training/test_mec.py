"""The objective as the training loop sees it: what is coded, by which rows, with which weight, on which device."""

import math

import numpy as np
import pytest
import torch
from tiny_recording import recording, seeded
from torch import Tensor

from mecdeploy.training.coding import (
    coded_dimensions,
    coding_rate_exact,
    coding_rate_moe,
    normalize_rows,
    scale_rows,
)
from mecdeploy.training.config import MecConfig
from mecdeploy.training.mec import choose_rows, mec_objective, routing_energy, sample_index
from mecdeploy.training.recording import Recording


def features_of(recorded: Recording) -> Tensor:
    assert recorded.features is not None
    return recorded.features


def numpy_exact_rate(rows: Tensor, distortion: float) -> float:
    """R per dimension of rows centered and divided by their RMS norm: DESIGN's words, in float64 numpy."""
    values = rows.detach().double().numpy()
    values = values - values.mean(axis=0)
    values = values / math.sqrt((values**2).sum(axis=1).mean())
    samples, dimension = values.shape
    gram = np.eye(dimension) + dimension / (samples * distortion) * values.T @ values
    return float(np.linalg.slogdet(gram)[1] / 2 / min(samples, dimension))


def test_exact_form_is_the_rate_per_dimension_of_scaled_rows() -> None:
    recorded = recording()
    config = MecConfig(code=("features", "activations", "weights"), form="exact", beta=0.3, warmup=0.0, samples=10_000)
    result = mec_objective(recorded, config, step_fraction=0.0)
    assert recorded.features is not None
    positions = recorded.activations["conv"].detach().permute(0, 2, 3, 1).reshape(-1, 6)
    expected = {
        "features": numpy_exact_rate(recorded.features, 0.5),
        "activations": np.mean([numpy_exact_rate(rows, 0.5) for rows in (positions, recorded.activations["fc"])]),
        "weights": np.mean([numpy_exact_rate(rows, 0.5) for rows in recorded.weights.values()]),
    }
    for kind, rate in expected.items():
        # float32 rounding of the scaled rows, and NOISE (1e-8 against mean squares of some 1e-1).
        assert result.terms[kind].item() == pytest.approx(rate, rel=1e-5)
    assert result.total.item() == pytest.approx(0.3 * np.mean(list(expected.values())), rel=1e-5)
    assert set(result.terms) == {"features", "activations", "weights", "beta"}


def test_mixture_form_is_the_coding_functions_with_the_config() -> None:
    recorded = recording()
    config = MecConfig(distortion=0.7, experts=5, order=3, warmup=0.0, beta=1.0)
    assert recorded.features is not None
    rows, energy = scale_rows(recorded.features, center=True), recorded.features.detach().square().sum(dim=1)
    rate = coding_rate_moe(rows, distortion=0.7, experts=5, order=3, center=True, energy=energy)
    expected = rate / coded_dimensions(24, 12, experts=5, center=True)
    assert torch.equal(mec_objective(recorded, config, step_fraction=1.0).total, expected)


def test_without_centering_rows_stay_where_they_are() -> None:
    recorded = recording()
    assert recorded.features is not None
    rate = coding_rate_moe(scale_rows(recorded.features, center=False), distortion=0.5, experts=8, order=4)
    result = mec_objective(recorded, MecConfig(center=False), step_fraction=1.0)
    assert result.terms["features"].item() == pytest.approx(rate.item() / 3, rel=1e-6)  # 8 experts of 3 rows


def test_maximising_the_total_raises_the_exact_rate_of_every_kind() -> None:
    recorded = recording()
    config = MecConfig(code=("features", "activations", "weights"), samples=10_000, warmup=0.0, beta=1.0)
    mec_objective(recorded, config, step_fraction=1.0).total.backward()
    assert recorded.features is not None
    leaves = [recorded.features, recorded.activations["fc"], *recorded.weights.values()]
    for leaf in leaves:
        assert leaf.grad is not None
        step = 0.02 * leaf.detach().norm() / leaf.grad.norm()
        assert numpy_exact_rate(leaf + step * leaf.grad, 0.5) > numpy_exact_rate(leaf, 0.5)


# --- the weight -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "fraction", "beta"),
    [(0.1, 0.0, 0.0), (0.1, 0.05, 0.1), (0.1, 0.1, 0.2), (0.1, 1.0, 0.2), (0.0, 0.0, 0.2), (1.0, 0.25, 0.05)],
)
def test_beta_rises_linearly_and_stays(warmup: float, fraction: float, beta: float) -> None:
    result = mec_objective(recording(), MecConfig(beta=0.2, warmup=warmup), step_fraction=fraction)
    assert result.terms["beta"].item() == pytest.approx(beta, rel=1e-6)
    assert result.total.item() == pytest.approx(beta * result.terms["features"].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("warmup", "decay", "fraction", "beta"),
    [(0.0, 0.5, 0.4, 0.2), (0.0, 0.5, 0.75, 0.1), (0.5, 0.5, 0.5, 0.2), (0.5, 0.5, 0.25, 0.1), (0.1, 1e-3, 1.0, 0.0)],
)
def test_beta_falls_linearly_at_the_end(warmup: float, decay: float, fraction: float, beta: float) -> None:
    result = mec_objective(recording(), MecConfig(beta=0.2, warmup=warmup, decay=decay), step_fraction=fraction)
    assert result.terms["beta"].item() == pytest.approx(beta, rel=1e-6)  # it passes through float32


def test_logged_terms_keep_no_graph_and_the_total_does() -> None:
    result = mec_objective(recording(), MecConfig(), step_fraction=1.0)
    assert result.total.requires_grad
    assert not any(term.requires_grad for term in result.terms.values())


def test_nothing_coded_is_nothing_to_add() -> None:
    result = mec_objective(Recording(), MecConfig(code=()), step_fraction=1.0)
    assert result.total.item() == 0 and set(result.terms) == {"beta"}


# --- the rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "limit"), [(1, 1), (5, 9), (9, 9), (10, 9), (13, 4), (100_000, 256)])
def test_sampled_rows_differ_rise_and_cover(total: int, limit: int) -> None:
    index = sample_index(total, limit, seeded())
    count = min(total, limit)
    assert index.tolist() == sorted(set(index.tolist())) and len(index) == count
    for place, row in enumerate(index.tolist()):
        assert place * total // count <= row < (place + 1) * total // count


def test_every_row_can_be_sampled() -> None:
    seen = {row for seed in range(200) for row in sample_index(10, 3, seeded(seed)).tolist()}
    assert seen == set(range(10))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_chosen_rows_are_positions_with_their_channels(layout: torch.memory_format) -> None:
    output = torch.arange(3 * 4 * 5 * 6).float().reshape(3, 4, 5, 6).contiguous(memory_format=layout)
    positions = [tuple(output[n, :, h, w].tolist()) for n in range(3) for h in range(5) for w in range(6)]
    assert [tuple(row) for row in choose_rows(output, 1000, None).tolist()] == positions
    chosen = [tuple(row) for row in choose_rows(output, 17, seeded()).tolist()]
    assert chosen == [positions[row] for row in sample_index(90, 17, seeded()).tolist()]
    flat = torch.randn(7, 4)
    assert torch.equal(choose_rows(flat, 7, None), flat)
    assert torch.equal(choose_rows(flat, 3, seeded()), flat[sample_index(7, 3, seeded())])


def test_sampled_objective_follows_the_generator_alone() -> None:
    recorded = recording()
    config = MecConfig(code=("features", "activations"), samples=16)

    def total(seed: int) -> float:
        torch.rand(3)  # the global generator is not asked
        return mec_objective(recorded, config, step_fraction=1.0, generator=seeded(seed)).total.item()

    assert total(1) == total(1)
    assert total(1) != total(2)


def test_gradient_reaches_the_sampled_rows_only() -> None:
    recorded = recording()
    config = MecConfig(code=("activations",), samples=16, experts=4)
    mec_objective(recorded, config, step_fraction=1.0, generator=seeded()).total.backward()
    gradient = recorded.activations["conv"].grad
    assert gradient is not None
    touched = gradient.abs().sum(dim=1).flatten().nonzero().flatten().tolist()
    assert set(touched) <= set(sample_index(24 * 20, 16, seeded()).tolist())
    assert len(touched) >= 12  # a row that ReLU left empty may sit at its expert's mean


def test_every_filter_is_coded_whatever_samples_says() -> None:
    recorded = recording()
    mec_objective(recorded, MecConfig(code=("weights",), samples=2), step_fraction=1.0).total.backward()
    gradient = recorded.weights["fc"].grad
    assert gradient is not None
    assert bool((gradient.abs().sum(dim=1) > 0).all())


def test_faint_rows_are_routed_together_although_far_from_the_mean() -> None:
    strong = torch.rand(10, 6, generator=seeded()) + 5
    faint = torch.rand(10, 6, generator=seeded(1)) * 0.01
    order = routing_energy(torch.cat([strong, faint]) * 1e25).argsort()
    assert set(order[:10].tolist()) == set(range(10, 20))


# --- two views --------------------------------------------------------------------------------------------------------


def test_teacher_features_are_detached_and_augmented_ones_are_not() -> None:
    for views, attached in (("teacher", False), ("augmented", True)):
        recorded, other = recording(), recording(seed=1)
        result = mec_objective(recorded, MecConfig(views=views), other=other, step_fraction=1.0)
        result.total.backward()
        assert recorded.features is not None and other.features is not None
        assert recorded.features.grad is not None
        assert (other.features.grad is not None) == attached


@pytest.mark.parametrize("form", ["mixture", "exact"])
def test_two_views_are_coded_by_their_directions(form: str) -> None:
    recorded, other = recording(), recording(seed=1)
    assert recorded.features is not None and other.features is not None
    config = MecConfig(views="augmented", form=form, experts=4)
    result = mec_objective(recorded, config, other=other, step_fraction=1.0).terms["features"]
    first, second = (normalize_rows(features_of(each), center=True) for each in (recorded, other))
    if form == "exact":
        expected = coding_rate_exact(first, distortion=0.5, other=second) / 12
    else:
        energy = recorded.features.square().sum(dim=1) * other.features.square().sum(dim=1)
        rate = coding_rate_moe(
            first, distortion=0.5, experts=4, order=4, center=True, energy=energy.detach(), other=second
        )
        expected = rate / 5  # 4 experts of 6 rows about their mean
    assert result.item() == pytest.approx(expected.item(), rel=1e-6)
    swapped = mec_objective(other, config, other=recorded, step_fraction=1.0).terms["features"]
    assert result.item() == pytest.approx(swapped.item(), rel=1e-5)


def test_a_student_is_drawn_to_its_teacher() -> None:
    teacher, student = recording(seed=1), recording()
    assert teacher.features is not None and student.features is not None
    config = MecConfig(views="teacher", beta=1.0, warmup=0.0)
    before = torch.cosine_similarity(student.features, teacher.features).mean()
    for _ in range(50):
        assert student.features is not None
        total = mec_objective(student, config, other=Recording(features=teacher.features), step_fraction=1.0).total
        (gradient,) = torch.autograd.grad(total, student.features)
        student = Recording(features=(student.features + 3 * gradient).detach().requires_grad_())
    assert student.features is not None
    assert torch.cosine_similarity(student.features, teacher.features).mean() > before + 0.1


def test_both_views_are_sampled_at_the_same_rows() -> None:
    recorded = recording()
    config = MecConfig(views="teacher", samples=9)
    twin = mec_objective(recorded, config, other=recorded, step_fraction=1.0, generator=seeded()).terms["features"]
    chosen = features_of(recorded)[sample_index(24, 9, seeded())]
    unit = normalize_rows(chosen, center=True)
    rate = coding_rate_moe(
        unit, distortion=0.5, experts=8, order=4, center=True, energy=chosen.detach().square().sum(dim=1)
    )
    assert twin.item() == pytest.approx(rate.item() / coded_dimensions(9, 12, experts=8, center=True), rel=1e-5)


def test_the_other_view_leaves_activations_and_weights_alone() -> None:
    recorded = recording()
    config = MecConfig(code=("weights",), views="teacher")
    alone = mec_objective(recorded, config, step_fraction=1.0).total
    assert torch.equal(mec_objective(recorded, config, other=recording(1), step_fraction=1.0).total, alone)
