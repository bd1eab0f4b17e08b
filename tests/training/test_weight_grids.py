"""Weights on grids other than the plain range, against loops over single values."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from tiny_networks import SPEC, images, tiny_residual
from tiny_run import FINAL, assert_same_run, interrupt_at, is_stage, tiny_config, tiny_dataset
from torch import Tensor

from mecdeploy.training.calibration import calibrate, set_weight_steps
from mecdeploy.training.composed import twice_differentiable
from mecdeploy.training.config import QuantConfig, ScheduleConfig, TrainConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import TrainingInterrupted
from mecdeploy.training.loop import train
from mecdeploy.training.odd_grid import quantize_odd, search_odd_steps
from mecdeploy.training.preparation import prepare
from mecdeploy.training.units import WeightedUnit
from mecdeploy.training.weight_grids import (
    MidriseWeightQuantizer,
    TernaryWeightQuantizer,
    choose_weight_quantizer,
)
from mecdeploy.training.weight_quantizers import WeightQuantizer

BITS = (1, 2, 3, 4)


def odd(v: float, step: float, bits: int) -> tuple[int, float, float]:
    """Code, d real / d v and d real / d step of one value: the nearest odd integer, the upper one of two."""
    ratio, largest = v / step, 2**bits - 1
    code = min(range(-largest, largest + 1, 2), key=lambda level: (abs(Fraction(ratio) - level), -level))
    if abs(ratio) >= largest + 1:
        return code, 0.0, float(code)
    return code, 1.0, code - ratio


def odd_cases(bits: int) -> list[float]:
    """In steps: levels, what lies halfway between two, the edges and beyond, and anything."""
    edge = 2**bits
    points = [*range(-edge - 1, edge + 2), edge - 0.25, 0.25 - edge, 3.7 * edge, -9.0 * edge, 1e-30, -1e-30]
    return [float(point) for point in points] + np.random.default_rng(bits).normal(0, edge, 40).tolist()


@pytest.mark.parametrize("step", [0.25, 2.0])
@pytest.mark.parametrize("bits", BITS)
def test_odd_codes_and_their_gradients(bits: int, step: float) -> None:
    """Steps that are powers of two: halfway cases stay halfway. float64, so that sums are the loop's."""
    values = [point * step for point in odd_cases(bits)]
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(step, dtype=torch.float64, requires_grad=True)
    upstream = torch.linspace(-1.0, 2.0, len(values), dtype=torch.float64)

    codes = quantize_odd(x, s, bits)
    (codes * s * upstream).sum().backward()

    rows = [odd(v, step, bits) for v in values]
    assert codes.tolist() == [row[0] for row in rows]
    assert x.grad is not None and s.grad is not None
    np.testing.assert_allclose(x.grad, [u * row[1] for u, row in zip(upstream.tolist(), rows, strict=True)], rtol=1e-15)
    expected = sum(u * row[2] for u, row in zip(upstream.tolist(), rows, strict=True))
    assert abs(float(s.grad) - expected) < 1e-9  # float64 sums of 60 numbers below 1000, in another order


@pytest.mark.parametrize("bits", BITS)
def test_the_twice_differentiable_form_has_the_same_codes_and_gradients(bits: int) -> None:
    found = []
    for context in (nullcontext(), twice_differentiable()):
        x = torch.tensor(odd_cases(bits), dtype=torch.float64, requires_grad=True)
        s = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        with context:
            codes = quantize_odd(x, s, bits)
            (codes * s).square().sum().backward()
        found.append((codes.tolist(), x.grad, s.grad))
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert one is not None and other is not None
        np.testing.assert_allclose(one, other, rtol=1e-12)  # float64 sums in another order


@pytest.mark.parametrize("bits", BITS)
def test_the_step_gradient_is_that_of_the_clipped_values(bits: int) -> None:
    """Beyond the reach nothing is straight-through: a finite difference of the real value itself."""
    step, difference = 0.3, 1e-6
    far = torch.tensor([1.1, -2.0, 7.0], dtype=torch.float64) * step * 2**bits
    s = torch.tensor(step, dtype=torch.float64, requires_grad=True)
    (quantize_odd(far, s, bits) * s).square().sum().backward()

    def value(at: float) -> float:
        return float((quantize_odd(far, torch.tensor(at, dtype=torch.float64), bits) * at).square().sum())

    measured = (value(step + difference) - value(step - difference)) / (2 * difference)
    assert s.grad is not None
    assert abs(float(s.grad) - measured) < 1e-6 * abs(measured)  # central difference: error of the order difference^2


@pytest.mark.parametrize("bits", BITS)
def test_odd_steps_lose_no_more_than_any_of_a_fine_search(bits: int) -> None:
    values = torch.randn(3, 400, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    found = search_odd_steps(values, bits)
    levels = np.arange(1 - 2**bits, 2**bits, 2)
    for row, step in zip(values.numpy(), found.tolist(), strict=True):

        def error(at: float, row: np.ndarray = row) -> float:
            return float((np.abs(row[:, None] - at * levels).min(axis=1) ** 2).sum())

        finest = min(error(float(np.abs(row).max()) * index / 300) for index in range(1, 301))
        assert error(step) <= finest * 1.01  # the search's own candidates are 64
        if bits == 1:
            assert math.isclose(step, float(np.abs(row).mean()), rel_tol=1e-12)
    zeros = search_odd_steps(torch.zeros(2, 5), bits)
    assert bool((zeros > 0).all()) and float(zeros.max()) < 1e-11, "a dead channel stays next to dead"


@pytest.mark.parametrize("bits", BITS)
def test_midrise_scales_the_gradient_by_the_weights_of_a_channel(bits: int) -> None:
    weight = torch.randn(3, 5, 2, 2, generator=torch.Generator().manual_seed(bits))
    quantizer = MidriseWeightQuantizer(bits, 3)
    with torch.no_grad():
        quantizer.step.copy_(torch.tensor([0.5, 0.0625, 1.75]))  # float32 quotients are the loop's
    codes, step = quantizer(weight)
    (codes * step.view(-1, 1, 1, 1)).sum().backward()
    assert quantizer.step.grad is not None
    for channel in range(3):
        rows = [odd(v, quantizer.step[channel].item(), bits) for v in weight[channel].flatten().double().tolist()]
        assert codes[channel].flatten().tolist() == [row[0] for row in rows]
        expected = sum(row[2] for row in rows) / math.sqrt(20 * (2**bits - 1))
        assert quantizer.step.grad[channel].item() == pytest.approx(expected, abs=1e-3)  # float32 sums of 20 below 16
    assert quantizer.levels.tolist() == list(range(-(2**bits) + 1, 2**bits, 2))
    assert (quantizer.lower, quantizer.upper) == (1 - 2**bits, 2**bits - 1)


def test_ternary_is_lsq_with_three_codes() -> None:
    quantizer = TernaryWeightQuantizer(2, 1)
    weight = torch.tensor([[-9.0, -1.0, -0.6, -0.4, 0.0, 0.4, 0.6, 1.0, 9.0]], requires_grad=True)
    codes, step = quantizer(weight)
    (codes * step.view(-1, 1)).sum().backward()
    assert codes.tolist() == [[-1, -1, -1, 0, 0, 0, 1, 1, 1]]
    assert weight.grad is not None and weight.grad.tolist() == [[0, 0, 1, 1, 1, 1, 1, 0, 0]]
    assert quantizer.levels.tolist() == [-1, 0, 1]


@pytest.mark.parametrize(
    ("bits", "grid", "kind"),
    [
        (1, "uniform", MidriseWeightQuantizer),
        (1, "midrise", MidriseWeightQuantizer),
        (2, "uniform", WeightQuantizer),
        (2, "midrise", MidriseWeightQuantizer),
        (4, "midrise", MidriseWeightQuantizer),
        (8, "midrise", WeightQuantizer),
        (2, "ternary", TernaryWeightQuantizer),
        (3, "ternary", WeightQuantizer),
        (8, "ternary", WeightQuantizer),
    ],
)
def test_which_layer_has_which_grid(bits: int, grid: str, kind: type) -> None:
    quantizer = choose_weight_quantizer(torch.zeros(6, 4, 3, 3), bits, grid)
    assert type(quantizer) is kind and quantizer.bits == bits


def test_the_first_and_last_layer_keep_8_uniform_bits() -> None:
    model = prepare(tiny_residual(), QuantConfig(weight_bits=2, weight_grid="midrise"), SPEC)
    units = {name: unit for name, unit in model.units().items() if isinstance(unit, WeightedUnit)}
    kinds = [type(unit.weight_quantizer) for unit in units.values()]
    assert kinds[0] is kinds[-1] is WeightQuantizer
    assert set(kinds[1:-1]) == {MidriseWeightQuantizer}
    assert {id(step) for step in model.step_sizes()} >= {id(unit.weight_quantizer.step) for unit in units.values()}


@pytest.mark.parametrize(("grid", "bits"), [("midrise", 1), ("midrise", 2), ("ternary", 2)])
def test_calibration_sets_the_steps_that_lose_least(grid: str, bits: int) -> None:
    model = prepare(tiny_residual(), QuantConfig(weight_bits=bits, weight_grid=grid, act_bits=1), SPEC)
    calibrate(model, [images(16)])
    for unit in model.units().values():
        if isinstance(unit, WeightedUnit) and unit.weight_quantizer.levels is not None:
            quantizer, weight = unit.weight_quantizer, unit.weight.detach().flatten(1)
            found, levels = quantizer.step.detach().clone(), quantizer.levels.float()

            def error(step: Tensor, weight: Tensor = weight, levels: Tensor = levels) -> Tensor:
                return (weight[..., None] - step[:, None, None] * levels).square().amin(2).sum(1)

            for factor in np.linspace(0.3, 3.0, 60).tolist():
                assert bool(
                    (error(found) <= 1.1 * error(found * factor)).all()
                )  # 64 candidates, for a few dozen weights
            set_weight_steps(unit)
            assert torch.equal(quantizer.step, found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"weight_grid": "odd"},
            "quant.weight_grid is 'odd'; choose one of uniform, midrise, ternary, levels, codebook",
        ),
        (
            {"weight_grid": "ternary"},
            "quant.weight_grid is ternary, which has 2 bits, and quant.weight_bits 4; set quant",
        ),
        ({"weight_bits": 5}, "quant.weight_bits is 5; choose one of 1, 2, 3, 4, 8."),
        ({"first_last_bits": 1}, "quant.first_last_bits is 1; choose one of 2, 3, 4, 8."),
        ({"skip_bits": 1}, "quant.skip_bits is 1; choose one of 2, 3, 4, 8."),
    ],
)
def test_what_no_grid_is_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        QuantConfig(**settings)  # type: ignore[arg-type]


def test_a_grid_for_no_layer_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"levels and quant.weight_bits 8: a grid is that of weights below 8 bits"):
        TrainConfig(quant=QuantConfig(weight_grid="levels", weight_bits=8))
    assert TrainConfig(quant=QuantConfig(weight_grid="levels", weight_bits=8, first_last_bits=4))
    assert TrainConfig(quant=QuantConfig(weight_grid="levels", weight_bits=8, overrides={"a": {"weight_bits": 4}}))


@pytest.mark.parametrize("quant", [{"weight_grid": "midrise", "weight_bits": 2}, {"weight_bits": 1}])
def test_what_needs_the_plain_range_is_refused(quant: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=r"schedule.progressive is \[8\]; wider forms of that grid are no int8"):
        TrainConfig(quant=QuantConfig(**quant), schedule=ScheduleConfig(progressive=(8,)))
    with pytest.raises(TrainingError, match=r"and quant.freezing is 0.05; the running mean that it rounds"):
        TrainConfig(quant=QuantConfig(**quant, freezing=0.05))
    with pytest.raises(TrainingError, match=r"and method is dorefa, whose weights have a grid of their own"):
        TrainConfig(quant=QuantConfig(**quant), method="dorefa")


def test_an_older_run_has_the_uniform_grid() -> None:
    described = TrainConfig().describe()
    del described["quant"]["weight_grid"]
    assert TrainConfig.from_description(described) == TrainConfig()


GRID_RUNS = [{"weight_grid": "midrise", "weight_bits": 2}, {"weight_bits": 1, "act_bits": 1}]


@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize("settings", GRID_RUNS, ids=str)
def test_a_run_trains_its_steps_and_resumes_exactly(settings: dict[str, object], tmp_path) -> None:
    config = replace(tiny_config(), quant=QuantConfig(**settings))  # type: ignore[arg-type]
    train(config, tiny_dataset(), tmp_path / "whole")
    for stage in ("qat", "deploy"):
        with pytest.raises(TrainingInterrupted):
            train(config, tiny_dataset(), tmp_path / stage, report=interrupt_at(is_stage(stage)))
        train(config, tiny_dataset(), tmp_path / stage, resume=True)
        assert_same_run(tmp_path / stage, tmp_path / "whole")
    assert (tmp_path / "whole" / FINAL).exists()
