"""PACT, DoReFa and LSQ+ against loops over the papers' cases, and runs of each that train, resume and deploy."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_networks import SPEC, images, tiny_residual
from tiny_run import FINAL, LAST, interrupt_at, is_step, tensors_in, tiny_config, tiny_dataset
from torch import Tensor

from mecdeploy.config import run_name
from mecdeploy.training import load_run, train
from mecdeploy.training.calibration import calibrate
from mecdeploy.training.config import METHODS, QuantConfig, ScheduleConfig, TrainConfig
from mecdeploy.training.diagnose import parameter_names
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import TrainingInterrupted
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.optimizers import build_optimizer, set_learning_rate
from mecdeploy.training.preparation import prepare
from mecdeploy.training.quantizers import ActivationQuantizer, QTensor, add
from mecdeploy.training.state import State
from mecdeploy.training.units import WeightedUnit
from mecdeploy.training.weight_quantizers import (
    DorefaWeightQuantizer,
    WeightQuantizer,
    make_weight_quantizer,
    three_sigma_steps,
)

BASELINES = ("lsq+", "pact", "dorefa")


def clip(bits: int, step: float, *, pact: bool = True) -> ActivationQuantizer:
    output = ActivationQuantizer(bits, signed=False, pact=pact).double()
    with torch.no_grad():
        output.step.fill_(step)
    return output


def way(name: str, output: ActivationQuantizer, x: Tensor) -> QTensor:
    """How layers, tables, float means and products quantise."""
    step = output.effective_step(x[0].numel())
    return {
        "forward": lambda: output(x),
        "ratio": lambda: output.from_ratio(x / step, step),
        "stored": lambda: output.from_stored(x / step, step),
        "product": lambda: output.from_product(x, 1.0 / step, step),
    }[name]()


def pact(x: float, alpha: float, qmax: int) -> tuple[float, float, float]:
    """PACT by cases: its value (eq. 1 and 2), and its slopes in x (straight-through) and in alpha (eq. 3)."""
    clipped = 0.5 * (abs(x) - abs(x - alpha) + alpha)
    return round(clipped * qmax / alpha) * alpha / qmax, float(0 < x < alpha), float(x >= alpha)


@pytest.mark.parametrize("name", ["forward", "ratio", "stored", "product"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pact_gradients(name: str, bits: int) -> None:
    """Below, inside and above, at both bounds and at ties, in float64; the step's divided by qmax as its docstring has
    it: the gradient of alpha / qmax."""
    step, qmax = 0.25, 2**bits - 1  # a power of two: bounds and ties are hit exactly
    alpha = step * qmax
    edges = torch.tensor([-1.0, 0.0, alpha, alpha + 1e-9, alpha - 1e-9, 1.5 * step, 0.5 * step, 3 * alpha])
    generator = torch.Generator().manual_seed(bits)
    inner = torch.randn(40, generator=generator, dtype=torch.float64) * alpha
    x = torch.cat([edges.double(), inner]).view(2, -1).requires_grad_()
    upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    output = clip(bits, step)

    result = way(name, output, x)
    (result.dequantize() * upstream).sum().backward()

    assert x.grad is not None and output.step.grad is not None
    of_alpha = 0.0
    for value, g, real, grad in zip(
        *(t.flatten().tolist() for t in (x, upstream, result.dequantize(), x.grad)), strict=True
    ):
        expected, of_x, slope = pact(value, alpha, qmax)
        assert real == pytest.approx(expected, rel=1e-14)  # alpha / qmax rounds
        assert grad == pytest.approx(g * of_x, rel=1e-12)
        of_alpha += g * slope
    # 1e-12 of the largest term: inside, a term and what takes it back cancel to rounding
    assert output.step.grad.item() == pytest.approx(of_alpha / qmax, rel=1e-12, abs=1e-12)


def test_pact_follows_finite_differences_of_the_clip() -> None:
    """Without the rounding, the loss as a function of alpha is smooth but for the bound."""
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(3, 50, generator=generator, dtype=torch.float64) * 4 for _ in range(2))
    output, h = clip(4, 0.2), 1e-6

    def loss(alpha: float) -> float:
        return float((np.clip(x.numpy(), 0.0, alpha) * upstream.numpy()).sum())

    (output(x).dequantize() * upstream).sum().backward()
    slope = (loss(3.0 + h) - loss(3.0 - h)) / (2 * h)
    assert output.step.grad is not None
    assert output.step.grad.item() * 15 == pytest.approx(slope, rel=1e-6)  # of finite differences


def test_pact_in_a_sum_read_at_two_widths() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(-8, 8, (3, 4, 5, 5), generator=generator).double() for _ in range(2)]
    a, b = (QTensor(c, torch.tensor(s).double(), 8, 15) for c, s in zip(codes, (0.31, 0.17), strict=True))
    total = codes[0].numpy() * 0.31 + codes[1].numpy() * 0.17
    outputs = [clip(8, 0.01), clip(4, 0.12)]
    for output, result in zip(outputs, add(a, b, outputs), strict=True):
        upstream = torch.randn(total.shape, generator=generator, dtype=torch.float64)
        (result.dequantize() * upstream).sum().backward(retain_graph=True)
        alpha = output.step.item() * output.qmax
        expected = upstream.numpy()[total >= alpha].sum() / output.qmax
        assert output.step.grad is not None
        assert output.step.grad.item() == pytest.approx(expected, rel=1e-10)  # float64 scales of other roundings


@pytest.mark.parametrize("name", ["forward", "ratio", "stored", "product"])
def test_pact_has_the_integers_of_lsq(name: str) -> None:
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    ours, lsq = (way(name, clip(4, 0.17, pact=on), x) for on in (True, False))
    assert bool((ours.codes == lsq.codes).all()) and ours.scale == lsq.scale


def test_a_signed_quantiser_stays_lsqs() -> None:
    x = torch.randn(2, 30, generator=torch.Generator().manual_seed(1))
    grads = []
    for on in (True, False):
        output = ActivationQuantizer(4, signed=True, pact=on)
        output(x).dequantize().sum().backward()
        assert output.step.grad is not None
        grads.append(output.step.grad.item())
    assert grads[0] == grads[1]


def test_an_update_of_the_step_is_pacts_update_of_alpha() -> None:
    """Momentum and decay included, over several steps, against a loop over alpha in floats."""
    output = clip(4, 0.2)
    schedule = ScheduleConfig(momentum=0.9, weight_decay=0.01)
    optimizer = build_optimizer(output, schedule, [output.step], [output.step])
    set_learning_rate(optimizer, 0.003)
    generator = torch.Generator().manual_seed(0)
    alpha, velocity = 3.0, 0.0
    for _ in range(5):
        x, upstream = (torch.randn(2, 40, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
        optimizer.zero_grad()
        (output(x).dequantize() * upstream).sum().backward()
        optimizer.step()
        gradient = sum(g for v, g in zip(x.flatten().tolist(), upstream.flatten().tolist(), strict=True) if v >= alpha)
        velocity = 0.9 * velocity + gradient + 0.01 * alpha
        alpha -= 0.003 * velocity
        assert output.step.item() * 15 == pytest.approx(alpha, rel=1e-9)  # the decay is 1e-2 of it


def dorefa(weight: np.ndarray, bits: int) -> tuple[np.ndarray, float]:
    """Eq. 9 by a loop: w_o = 2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1, as its numerator over 2^k - 1."""
    n = 2**bits - 1
    largest = max(abs(math.tanh(w)) for w in weight.flatten())
    codes = [2 * round(n * (math.tanh(w) / (2 * largest) + 0.5)) - n for w in weight.flatten()]  # half to even
    return np.array(codes).reshape(weight.shape), largest


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dorefa_codes_and_gradients(bits: int) -> None:
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    weight[0, 0, 0] = torch.tensor([0.0, 4.0, -4.0])  # a tie, the largest of either sign
    weight.requires_grad_()
    quantizer = make_weight_quantizer(bits, 5, "dorefa")
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    codes, step = quantizer(weight)
    (codes * step.view(-1, 1, 1, 1) * upstream).sum().backward()

    expected, largest = dorefa(weight.detach().numpy(), bits)
    assert np.array_equal(codes.detach().numpy(), expected)
    assert step.tolist() == pytest.approx([largest / (2**bits - 1)] * 5, rel=1e-14)  # tanh of two libraries
    assert weight.grad is not None
    for w, g, grad in zip(*(t.flatten().tolist() for t in (weight, upstream, weight.grad)), strict=True):
        assert grad == pytest.approx(g * (1 - math.tanh(w) ** 2), rel=1e-9)  # 1 - tanh^2 cancels at 4
    levels = quantizer.levels
    assert levels is not None and levels.dtype == torch.int8 and len(levels) == 2**bits
    assert levels.tolist() == sorted(set(expected.flatten().tolist()))  # every level occurs, 0 is none


def test_ties_between_levels_go_to_the_even_position() -> None:
    """Positions 0..3 at 2 bits: w' = -2/3, 0, 2/3 lie midway and go to 0, 2 and 2."""
    weight = torch.atanh(torch.tensor([[-0.5, -1 / 3, 0.0, 1 / 3, 0.5]], dtype=torch.float64))
    codes, _ = make_weight_quantizer(2, 1, "dorefa")(weight)
    assert codes[0, [0, 2, 4]].tolist() == [-3, 1, 3]


def test_dorefa_starts_where_the_network_was() -> None:
    """Levels of small weights are no further from them than half a spacing, two steps."""
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(2)) * 0.02
    codes, step = make_weight_quantizer(4, 4, "dorefa")(weight)
    # and tanh(w) is w up to w^3 / 3
    assert bool(((codes * step[:, None] - weight).abs() <= step[:, None] + weight.abs().max() ** 3 / 3 + 1e-7).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_weight_of_zeros_stays_finite(bits: int) -> None:
    codes, step = make_weight_quantizer(bits, 2, "dorefa")(torch.zeros(2, 3))
    assert codes.tolist() == [[1] * 3] * 2 and bool((step > 0).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_first_steps_of_lsq_plus(bits: int) -> None:
    rng = np.random.default_rng(bits)
    weight = rng.normal(0.3, 0.5, (6, 40)) * rng.choice([-1, 1], (6, 1))
    weight[5] = 0.0
    steps = three_sigma_steps(torch.from_numpy(weight), bits)
    for row, step in zip(weight, steps.tolist(), strict=True):
        mu, sigma = np.mean(row), np.std(row)
        expected = max(abs(mu - 3 * sigma), abs(mu + 3 * sigma)) / 2 ** (bits - 1)
        assert step == pytest.approx(expected or 1 / (2 ** (bits - 1) - 1), rel=1e-12)


def prepared(method: str) -> QuantizedModel:
    model = prepare(tiny_residual().eval(), QuantConfig(), SPEC, method)
    calibrate(model, [images(8)])
    return model


def weighted(model: QuantizedModel) -> list[WeightedUnit]:
    return [unit for unit in model.units().values() if isinstance(unit, WeightedUnit)]


@pytest.mark.parametrize("method", ["pact", "dorefa"])
def test_dorefa_quantises_inner_layers_and_lsq_the_ends(method: str) -> None:
    kinds = {unit.weight_quantizer.bits: type(unit.weight_quantizer) for unit in weighted(prepared(method))}
    assert kinds == {8: WeightQuantizer, 4: DorefaWeightQuantizer}


def test_what_follows_which_rule() -> None:
    """PACT: every unsigned activation, and no other method's. LSQ+: learned zero points and its own first steps."""
    for method in (*BASELINES, "mec"):
        model = prepared(method)
        outputs = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
        assert {output.signed for output in outputs} == {True, False}
        assert all(output.pact == (method == "pact" and not output.signed) for output in outputs)
        assert all((output.offset is not None) == (method == "lsq+" and output.signed) for output in outputs)
        assert len(model.clipping_steps()) == (sum(not o.signed for o in outputs) if method == "pact" else 0)
        assert {id(step) for step in model.step_sizes()} <= parameter_names(model).keys()
    for unit in weighted(prepared("lsq+")):
        row = unit.weight.detach().flatten(1).numpy().astype(np.float64)
        reach = np.maximum(abs(row.mean(1) - 3 * row.std(1)), abs(row.mean(1) + 3 * row.std(1)))
        expected = reach / 2 ** (unit.weight_quantizer.bits - 1)
        found = unit.weight_quantizer.step.detach().numpy()  # type: ignore[union-attr]
        np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32 sums of some ten terms


def test_mec_and_lsq_are_what_prepare_makes_unasked() -> None:
    states = [prepared(method).state_dict() for method in ("lsq", "mec")]
    model = prepare(tiny_residual().eval(), QuantConfig(), SPEC)
    calibrate(model, [images(8)])
    for state in states:
        assert state.keys() == model.state_dict().keys()
        assert all(bool((tensor == state[name]).all()) for name, tensor in model.state_dict().items())


def test_deployed_dorefa_adds_odd_integers() -> None:
    """A unit in evaluation against integers in numpy: the codes times the input's, at the scales' product."""
    model = prepared("dorefa").eval()
    x = images(4)
    values = {name: value for _, name, value in model.values(model.quantize(x)) if isinstance(value, QTensor)}
    values["pixels"] = model.quantize(x)
    checked = 0
    for step in model.program:
        unit = model.unit(step.unit)
        if not isinstance(unit, WeightedUnit) or unit.weight_quantizer.bits == 8 or unit.geometry is None:
            continue
        read, made = values[step.reads[0]], values[unit.output_names[0]]
        weight = unit.weight.detach().numpy()
        n = 2**unit.weight_quantizer.bits - 1
        squashed = np.tanh(weight)
        reach = np.abs(squashed).max()
        codes = 2 * np.rint((squashed / reach + np.float32(1)) * np.float32(n / 2)).astype(np.int64) - n
        scale, bias = unit.folded(torch.full((len(weight),), float(reach / np.float32(n))), read.scale)
        integers = torch.nn.functional.conv2d(
            read.codes.long(),
            torch.from_numpy(codes),
            bias.detach().long(),
            unit.geometry.stride,
            unit.geometry.symmetric_padding or 0,
            unit.geometry.dilation,
            unit.geometry.groups,
        )
        multiplier = (read.scale * scale).detach().numpy() / made.scale.detach().numpy()
        real = np.rint(integers.numpy().astype(np.float32) * multiplier.reshape(-1, 1, 1))
        assert np.array_equal(np.clip(real, made.lower, made.upper), made.codes.detach().numpy())
        checked += 1
    assert checked >= 2


@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize("method", BASELINES)
def test_a_run_resumes_bit_for_bit_and_loads(method: str, tmp_path: Path) -> None:
    config = tiny_config(method=method)
    train(config, tiny_dataset(), tmp_path / "whole")
    for stage in ("qat", "deploy"):
        with pytest.raises(TrainingInterrupted):
            report = interrupt_at(is_step(stage, 1, 2))
            train(config, tiny_dataset(), tmp_path / "run", resume=stage == "deploy", report=report)
    train(config, tiny_dataset(), tmp_path / "run", resume=True)
    for name in (FINAL, LAST):
        whole, resumed = (tensors_in(tmp_path / folder / name) for folder in ("whole", "run"))
        assert whole.keys() == resumed.keys()
        assert all(bool((whole[key] == resumed[key]).all()) for key in whole)
    run = load_run(tmp_path / "whole")
    assert run.config.method == method
    assert sum(unit.weight_quantizer.levels is not None for unit in weighted(run.model)) == (method != "lsq+")


@pytest.mark.usefixtures("tiny_models")
def test_in_a_run_of_pact_clipping_levels_decay() -> None:
    for method in ("pact", "dorefa"):
        state = State(tiny_config(method=method), tiny_dataset(), torch.device("cpu"))
        state.quantize()
        assert state.model is not None
        guarded = [group for group in state.optimizer.param_groups if group["step_sizes"]]
        decaying = {id(p) for group in guarded if group["weight_decay"] for p in group["params"]}
        outputs = [module for module in state.model.modules() if isinstance(module, ActivationQuantizer)]
        assert decaying == {id(o.step) for o in outputs if method == "pact" and not o.signed}
        assert {id(p) for group in guarded for p in group["params"]} == {id(p) for p in state.model.step_sizes()}


def test_lsq_plus_implies_learned_zero_points_and_refuses_to_compile() -> None:
    assert TrainConfig(method="lsq+").quant.zero_point == "learned"
    assert TrainConfig(method="lsq").quant.zero_point == "fixed"
    with pytest.raises(TrainingError, match=r"compile is true and quant.zero_point learned \(method lsq\+ has it so\)"):
        replace(TrainConfig(method="lsq+"), schedule=ScheduleConfig(compile=True))


def test_names() -> None:
    assert METHODS == ("mec", "lsq", "lsq+", "pact", "dorefa", "fp32")
    assert run_name(TrainConfig(method="lsq+")) == "digits-resnet8-lsq+-w4a4-seed0"
    with pytest.raises(TrainingError, match=r"method is 'fp32', which has no quantisers; choose one of mec, lsq"):
        prepare(tiny_residual(), QuantConfig(), SPEC, "fp32")
