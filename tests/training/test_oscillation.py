"""quant.damping and quant.freezing, against loops over single weights."""

import dataclasses
import math

import pytest
import torch
from test_quantized_model import calibrated
from tiny_run import assert_same_run, interrupt_at, is_step, tensors_in, tiny_config, tiny_dataset

from mecdeploy.training.config import QuantConfig, ScheduleConfig, TrainConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import EpochEvent, TrainingInterrupted
from mecdeploy.training.loop import train
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.oscillation import WeightFreezer, damping_loss, damping_weight, low_bit_layers


def with_quant(config: TrainConfig, **quant: object) -> TrainConfig:
    return dataclasses.replace(config, quant=QuantConfig(**quant))  # type: ignore[arg-type]


def loop_over_weights(model: QuantizedModel, names: list[str]) -> tuple[float, dict[str, list[float]]]:
    """The loss and its gradient, 2 (w - s round(w / s)) inside the range and 0 outside, weight by weight."""
    total, gradients = 0.0, {}
    for name in names:
        unit = model.unit(name)
        gradients[name] = []
        for row, step in zip(unit.weight.detach().flatten(1).double(), unit.weight_quantizer.step, strict=True):  # type: ignore[operator,union-attr]
            s = float(step.detach())
            for w in row.tolist():
                n, p = -8, 7
                integer = min(p, max(n, round(w / s)))
                clipped = min(p * s, max(n * s, w))
                total += (s * integer - clipped) ** 2
                gradients[name].append(2 * (w - s * integer) if n * s < w < p * s else 0.0)
    return total, gradients


def test_damping_draws_every_low_bit_weight_to_the_middle_of_its_bin() -> None:
    model = calibrated(weight_bits=4)
    layers = low_bit_layers(model)
    assert list(layers) == ["first", "second", "hidden"]  # stem and fc have 8 bits
    with torch.no_grad():
        layers["first"].weight[0, 0, 0, :2] = torch.tensor([9.0, -9.0])  # far outside the range
    loss = damping_loss(layers)
    loss.backward()
    expected, gradients = loop_over_weights(model, list(layers))
    assert loss.item() == pytest.approx(expected, rel=1e-5)  # float32 sums
    for name, unit in layers.items():
        assert unit.weight.grad is not None
        # A weight less a grid point in float32: an ulp of the weight, at most 1 in size.
        assert unit.weight.grad.flatten().tolist() == pytest.approx(gradients[name], abs=3e-7)
        assert unit.weight_quantizer.step.grad is None
    assert all(p.grad is None for name, p in model.named_parameters() if not name.endswith("weight"))


@pytest.mark.parametrize(("fraction", "share"), [(0.0, 0.0), (1 / 3, 0.25), (0.5, 0.5), (1.0, 1.0)])
def test_the_weight_of_damping_rises_by_half_a_cosine(fraction: float, share: float) -> None:
    assert damping_weight(0.2, fraction) == pytest.approx(0.2 * share, abs=1e-15)


# --- freezing ---------------------------------------------------------------------------------------------------------


class LoopFreezer:
    """One weight, after the paper's words; integers in, and what they are held at."""

    def __init__(self, integer: int, threshold: float) -> None:
        self.threshold, self.last, self.way, self.frequency, self.mean = threshold, integer, 0, 0.0, float(integer)
        self.held: int | None = None

    def see(self, integer: int) -> int:
        if self.held is not None:
            integer = self.held
        moved = (integer > self.last) - (integer < self.last)
        back = moved != 0 and self.way != 0 and moved != self.way
        self.frequency = 0.01 * back + 0.99 * self.frequency
        self.way, self.last = moved or self.way, integer
        self.mean = 0.01 * integer + 0.99 * self.mean
        if self.held is None and self.frequency > self.threshold:
            self.held = round(self.mean)
        return integer if self.held is None else self.held


def test_freezing_is_that_of_a_loop_over_weights() -> None:
    model = calibrated(weight_bits=4)
    layers = {"hidden": low_bit_layers(model)["hidden"]}
    unit = layers["hidden"]
    torch.manual_seed(0)
    start = torch.randint(-8, 8, unit.weight.shape)
    with torch.no_grad():
        unit.weight.copy_(start * unit.weight_quantizer.step[:, None])
    freezer = WeightFreezer(layers, threshold=0.025)
    loops = [LoopFreezer(integer, 0.025) for integer in start.flatten().tolist()]
    for step in range(60):
        wanted = (start + torch.randint(-1, 2, start.shape) * (torch.arange(6) > 1)).clamp(-8, 7)  # two columns rest
        with torch.no_grad():
            unit.weight_quantizer.step.mul_(1.0 + 0.01 * torch.randn(8))
            unit.weight.copy_(wanted * unit.weight_quantizer.step[:, None])
        freezer.update()
        codes, _ = unit.weight_quantizer(unit.weight)
        expected = [loop.see(integer) for loop, integer in zip(loops, wanted.flatten().tolist(), strict=True)]
        assert codes.flatten().tolist() == expected, step
    frozen = freezer.tensors()["hidden.frozen"]
    assert frozen.flatten().tolist() == [loop.held is not None for loop in loops]
    assert int(frozen[:, 2:].sum()) > 0 and not bool(frozen[:, :2].any())


QUANT = {"damping": 0.1, "freezing": 0.005, "weight_bits": 2}
"""At this threshold a weight is frozen as soon as it turns back once."""


@pytest.mark.usefixtures("tiny_models")
def test_a_run_holds_what_it_froze_and_resumes_to_the_bit(tmp_path) -> None:
    config = with_quant(tiny_config(method="lsq", learning_rate=0.3, keep_checkpoints=100), **QUANT)
    events = []
    train(config, tiny_dataset(), tmp_path / "whole", report=events.append)
    for session, where in enumerate([("qat", 1, 2), ("qat", 2, 3), ("deploy", 1, 1)]):
        with pytest.raises(TrainingInterrupted):
            train(config, tiny_dataset(), tmp_path / "run", resume=session > 0, report=interrupt_at(is_step(*where)))
    train(config, tiny_dataset(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")

    last = tensors_in(tmp_path / "whole" / "checkpoint-deploy-0002.safetensors")
    frozen, held = last["freezer.conv2.frozen"], last["freezer.conv2.held"]
    assert bool(frozen.any()) and not bool(frozen.all())
    codes = torch.round(
        last["model.body.conv2.weight"] / last["model.body.conv2.weight_quantizer.step"].view(-1, 1, 1, 1)
    )
    assert torch.equal(codes[frozen], held[frozen].float())
    assert {name.split(".")[1] for name in last if name.startswith("freezer.")} == {"conv2"}
    final = tensors_in(tmp_path / "whole" / "checkpoint-final.safetensors")
    assert not [name for name in final if name.startswith("freezer.")]
    epochs = [e for e in events if isinstance(e, EpochEvent)]
    assert ["damping" in e.terms for e in epochs] == [False] * 2 + [True] * 4
    assert all(e.loss == pytest.approx(math.fsum(e.terms.values()), rel=1e-5) for e in epochs)


@pytest.mark.usefixtures("tiny_models")
@pytest.mark.parametrize("key", ["damping", "freezing"])
def test_a_network_without_such_layers_is_refused_before_training(tmp_path, key) -> None:
    config = with_quant(tiny_config(method="lsq"), weight_bits=8, **{key: 0.1})
    with pytest.raises(
        TrainingError, match=f"quant.{key} is 0.1, but no layer has weights of fewer than 8 bits; set it"
    ):
        train(config, tiny_dataset(), tmp_path / "run")


@pytest.mark.parametrize("method", ["pact", "dorefa"])
def test_weights_without_step_sizes_are_refused(method) -> None:
    for quant, schedule, key in (
        ({"damping": 0.1}, {}, "quant.damping is 0.1"),
        ({"freezing": 0.1}, {}, "quant.freezing is 0.1"),
        ({"weight_bits": 2}, {"progressive": (8, 4)}, r"schedule.progressive is \[8, 4\]"),
    ):
        with pytest.raises(TrainingError, match=f"{key}, which needs weights with step sizes, and method {method} has"):
            TrainConfig(method=method, quant=QuantConfig(**quant), schedule=ScheduleConfig(**schedule))


def test_settings_out_of_range_or_at_odds_are_refused() -> None:
    with pytest.raises(TrainingError, match="quant.damping is -1.0; it must be at least 0"):
        QuantConfig(damping=-1.0)
    with pytest.raises(TrainingError, match="quant.freezing is 1.0; it is a frequency, at least 0 and below 1"):
        QuantConfig(freezing=1.0)
    with pytest.raises(
        TrainingError, match="quant.freezing is 0.02 and schedule.averaging 0.9; an average would move w"
    ):
        TrainConfig(quant=QuantConfig(freezing=0.02), schedule=ScheduleConfig(averaging=0.9))
