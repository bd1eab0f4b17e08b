"""Learned levels and codebooks, against loops over single groups and closed forms."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_networks import SPEC, images, tiny_residual
from tiny_run import assert_same_run, interrupt_at, is_stage, tiny_config, tiny_dataset
from torch import Tensor

from mecdeploy.training.calibration import calibrate, search_steps
from mecdeploy.training.composed import twice_differentiable
from mecdeploy.training.config import QuantConfig, ScheduleConfig, TrainConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import TrainingInterrupted
from mecdeploy.training.loop import train
from mecdeploy.training.lsq import fake_quantize
from mecdeploy.training.optimizers import build_optimizer
from mecdeploy.training.preparation import prepare
from mecdeploy.training.table_grid import ROWS_AT_ONCE, fit_table, look_up, nearest
from mecdeploy.training.units import WeightedUnit
from mecdeploy.training.weight_grids import TableWeightQuantizer, choose_weight_quantizer, codebook_rows
from mecdeploy.training.weight_quantizers import WeightQuantizer

SHAPES = [(4, 1), (16, 1), (9, 4)]
"""Rows and width of a table."""


def case(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight [3, 2, 2, 2], step [3, 1, 1, 1], table [rows, width] and what the reals are multiplied by, float64."""
    generator = torch.Generator().manual_seed(rows)
    table = (torch.randperm(255, generator=generator)[: rows * width] - 127).double().view(rows, width)
    step = torch.tensor([0.02, 0.5, 1.3], dtype=torch.float64).view(3, 1, 1, 1)
    weight = torch.randn(3, 2, 2, 2, generator=generator, dtype=torch.float64) * 90 * step
    return weight, step, table, torch.randn(3, 2, 2, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_look_up_and_its_gradients_group_by_group(rows: int, width: int) -> None:
    weight, step, table, upstream = case(rows, width)
    leaves = [tensor.clone().requires_grad_() for tensor in (weight, step, table)]
    codes = look_up(*leaves)
    (codes * leaves[1] * upstream).sum().backward()

    grads = [np.zeros(tensor.shape) for tensor in leaves]
    entries = table.numpy()
    for channel in range(3):
        s, flat = float(step[channel]), weight[channel].flatten().numpy()
        out, up = codes[channel].detach().flatten().numpy(), upstream[channel].flatten().numpy()
        for start in range(0, 8, width):
            ratio = flat[start : start + width] / s
            row = int(((entries - ratio) ** 2).sum(axis=1).argmin())
            assert out[start : start + width].tolist() == entries[row].tolist()
            for place in range(width):
                at, inside = start + place, entries.min() < ratio[place] < entries.max()
                grads[0].reshape(3, 8)[channel, at] = up[at] if inside else 0.0
                grads[1].reshape(3)[channel] += up[at] * (entries[row, place] - (ratio[place] if inside else 0.0))
                grads[2][row, place] += up[at] * s
    for leaf, expected in zip(leaves, grads, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(leaf.grad, expected, rtol=1e-12, atol=1e-12)  # float64 sums in another order


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_the_gradient_of_a_table_is_a_finite_difference(rows: int, width: int) -> None:
    """While no weight changes its row the reals are linear in the table: exact up to float64's rounding."""
    weight, step, table, upstream = case(rows, width)
    leaf = table.clone().requires_grad_()
    (look_up(weight, step, leaf) * step * upstream).sum().backward()
    assert leaf.grad is not None
    index = nearest((weight / step).reshape(-1, width), table)
    for row in range(rows):
        for place in range(width):
            moved = table.clone()
            moved[row, place] += 1e-6
            assert torch.equal(nearest((weight / step).reshape(-1, width), moved), index)
            change = ((look_up(weight, step, moved) - look_up(weight, step, table)) * step * upstream).sum() / 1e-6
            assert abs(float(change) - float(leaf.grad[row, place])) < 1e-6


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_the_twice_differentiable_form_has_the_same_codes_and_gradients(rows: int, width: int) -> None:
    *given, upstream = case(rows, width)
    found = []
    for context in (nullcontext(), twice_differentiable()):
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        with context:
            codes = look_up(*leaves)
            (codes * leaves[1] * upstream).sum().backward()
        found.append([codes.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)  # float64 sums in another order


def test_nearest_takes_the_first_of_equal_ones_and_works_in_parts() -> None:
    table = torch.tensor([[3.0], [-1.0], [3.0], [1.0]])
    assert nearest(torch.tensor([[2.9], [-7.0], [0.1], [9.0], [-0.1]]), table).tolist()[1:3] == [1, 3]
    assert table[nearest(torch.tensor([[2.9], [9.0]]), table)].tolist() == [[3.0], [3.0]]
    vectors = torch.tensor([[0.0, 0.0], [5.0, 5.0]])
    many = torch.tensor([[1.0, 1.0], [4.0, 4.0]]).repeat(ROWS_AT_ONCE, 1)
    assert torch.equal(nearest(many, vectors), torch.tensor([0, 1]).repeat(ROWS_AT_ONCE))


def test_what_diverged_has_no_code() -> None:
    codes = look_up(torch.tensor([[float("nan"), 1.0]]), torch.ones(1, 1), torch.tensor([[-1.0], [1.0]]))
    assert bool(codes[0, 0].isnan()) and float(codes[0, 1]) == 1.0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fitted_tables_lose_less_than_the_uniform_grid(bits: int) -> None:
    spread = torch.linspace(0.01, 2.0, 12)[:, None]
    weight = torch.randn(12, 720, generator=torch.Generator().manual_seed(0)) * spread
    lower, upper = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    uniform = fake_quantize(weight, search_steps(weight, lower, upper)[:, None], lower, upper)

    def lost(real: Tensor) -> float:
        return float((real - weight).square().sum())

    def fitted(rows: int, width: int) -> float:
        step, table = fit_table(weight, rows, width)
        again = fit_table(weight, rows, width)
        assert torch.equal(step, again[0]) and torch.equal(table, again[1])
        assert float(table.abs().max()) == 1.0 and bool((step > 0).all())
        codes = look_up(weight, step[:, None], (127 * table).round())
        return lost(codes * step[:, None])

    assert fitted(1 << bits, 1) < 0.95 * lost(uniform)
    if bits == 2:
        assert fitted(256, 4) < fitted(4, 1)


def test_weights_of_few_values_are_kept_exactly() -> None:
    """A closed form: three values a channel, in the same ratios, are levels of four; a fourth one stays unused."""
    values = torch.tensor([-1.0, 0.25, 0.75]).repeat(5, 20)
    weight = values * torch.tensor([0.01, 0.1, 1.0, 10.0, 0.0])[:, None]
    step, table = fit_table(weight, 4, 1)
    real = 127 * table[nearest((weight / step[:, None]).reshape(-1, 1) / 127, table)].reshape(5, 60) * step[:, None]
    assert bool((real - weight).abs().le(1e-5 * weight.abs().amax(1, keepdim=True) + 1e-9).all())  # float32 sums


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((64, 64, 3, 3), 256),
        ((16, 16, 3, 3), 72),
        ((16, 1, 3, 3), 0),  # nine weights in a filter
        ((8, 4, 3, 3), 0),  # a vector for every eight groups would be nine vectors
        ((64, 128), 256),
        ((17, 32), 17),
    ],
)
def test_vectors_of_a_codebook(shape: tuple[int, ...], rows: int) -> None:
    weight = torch.zeros(shape)
    assert codebook_rows(weight) == rows
    quantizer = choose_weight_quantizer(weight, 2, "codebook")
    if rows:
        assert isinstance(quantizer, TableWeightQuantizer) and (quantizer.rows, quantizer.width) == (rows, 4)
    else:
        assert type(quantizer) is WeightQuantizer


@pytest.mark.parametrize(("bits", "grid"), [(1, "levels"), (2, "levels"), (4, "levels"), (2, "codebook")])
def test_what_trains_is_what_runs(bits: int, grid: str) -> None:
    weight = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(bits))
    quantizer = choose_weight_quantizer(weight, bits, grid)
    assert isinstance(quantizer, TableWeightQuantizer)
    with torch.no_grad():
        quantizer.fit(weight)
        quantizer.table[0] = -1.4  # held at an end
    codes, step = quantizer(weight)
    assert torch.equal(codes, codes.round()) and codes.abs().max().item() == 127
    levels = quantizer.levels
    assert levels.dtype == torch.int8
    known = {tuple(row) for row in levels.reshape(len(levels), -1).tolist()}
    assert {tuple(group) for group in codes.detach().reshape(-1, quantizer.width).int().tolist()} <= known
    (codes * step.view(-1, 1, 1, 1)).square().sum().backward()
    for parameter in (quantizer.table, quantizer.step):
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any())


def test_rows_that_come_to_be_equal_leave_a_codebook_its_bits() -> None:
    """Of 17 rows two alike: 16 different ones would be vectors of 1 bit a weight, which export refuses at 2 bits."""
    quantizer = choose_weight_quantizer(torch.zeros(17, 32), 2, "codebook")
    assert isinstance(quantizer, TableWeightQuantizer)
    with torch.no_grad():
        quantizer.table[:4] = quantizer.table[4:8]
    assert len(torch.unique(quantizer.levels, dim=0)) == 16
    assert quantizer.levels.shape == (17, 4)


def test_an_update_moves_levels_as_far_as_their_members_gradients_say() -> None:
    """The mean of n members' gradients, in units of the reach: by hand for one channel and two levels."""
    weight = torch.tensor([[0.9, 1.1, -0.8, -1.2, 1.0, -1.0]])
    quantizer = TableWeightQuantizer(1, 1, rows=2, width=1)
    with torch.no_grad():
        quantizer.step.fill_(1.0)
    codes, step = quantizer(weight)
    assert codes.tolist() == [[127, 127, -127, -127, 127, -127]] and step.item() == pytest.approx(1 / 127)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    (codes * step.view(-1, 1) * upstream).sum().backward()
    assert quantizer.table.grad is not None
    # levels -1 and 1 at a reach of 1: three members each
    np.testing.assert_allclose(quantizer.table.grad, np.array([13.0, 8.0]) / 3, rtol=1e-6)


def test_tables_do_not_decay() -> None:
    model = prepare(tiny_residual(), QuantConfig(weight_bits=2, weight_grid="levels"), SPEC)
    calibrate(model, [images(8)])
    tables = [
        unit.weight_quantizer.table for unit in units(model) if isinstance(unit.weight_quantizer, TableWeightQuantizer)
    ]
    groups = build_optimizer(model, ScheduleConfig(), model.step_sizes()).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert tables and {decay[id(table)] for table in tables} == {0.0}


def units(model: torch.nn.Module) -> list[WeightedUnit]:
    return [module for module in model.modules() if isinstance(module, WeightedUnit)]


def test_compiled_tables_are_refused() -> None:
    with pytest.raises(TrainingError, match="schedule.compile is true and quant.weight_grid levels; nothing compares"):
        TrainConfig(quant=QuantConfig(weight_grid="levels"), schedule=ScheduleConfig(compile=True))


@pytest.mark.usefixtures("tiny_models")
def test_a_run_trains_its_levels_and_resumes_exactly(tmp_path) -> None:
    config = replace(tiny_config(), quant=QuantConfig(weight_grid="levels", weight_bits=2))
    train(config, tiny_dataset(), tmp_path / "whole")
    for stage in ("qat", "deploy"):
        with pytest.raises(TrainingInterrupted):
            train(config, tiny_dataset(), tmp_path / stage, report=interrupt_at(is_stage(stage)))
        train(config, tiny_dataset(), tmp_path / stage, resume=True)
        assert_same_run(tmp_path / stage, tmp_path / "whole")
