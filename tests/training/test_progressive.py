"""schedule.progressive: which widths when, what keeps what it has learned, and that a run can stop anywhere."""

import dataclasses

import pytest
import torch
from test_quantized_model import calibrated
from tiny_networks import images
from tiny_run import FINAL, assert_same_tensors, interrupt_at, is_step, tensors_in, tiny_config, tiny_dataset

from mecdeploy.training import session, state
from mecdeploy.training.averaging import WeightAverage
from mecdeploy.training.config import QuantConfig, ScheduleConfig, TrainConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.events import EpochEvent, StageEvent, TrainingInterrupted
from mecdeploy.training.loop import train
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.progressive import FallingWidths, first_epoch, phase_at
from mecdeploy.training.units import WeightedUnit
from mecdeploy.training.watch import SizeWatch

LONG = {"epochs": 4, "frozen_epochs": 1, "fp_epochs": 1}


def two_bits(**schedule):
    config = tiny_config(method="lsq", **LONG, **schedule)
    falling = dataclasses.replace(config.schedule, progressive=(8, 4))
    return dataclasses.replace(config, schedule=falling, quant=QuantConfig(weight_bits=2, act_bits=3))


@pytest.mark.parametrize(("live", "expected"), [(3, "012"), (6, "001122"), (7, "0001122"), (8, "00011122")])
def test_shares_are_as_equal_as_they_can_be(live, expected):
    assert "".join(str(phase_at(epoch, live, (8, 4))) for epoch in range(live)) == expected
    assert [first_epoch(phase, live, (8, 4)) for phase in range(3)] == [
        expected.index(str(phase)) for phase in range(3)
    ]


def test_each_phase_has_its_widths_and_what_does_not_change_keeps_its_step():
    model = calibrated(weight_bits=2, act_bits=3)
    widths = {
        name: [
            unit.weight_quantizer.bits if hasattr(unit, "weight_quantizer") else None,
            *(o.bits for o in unit.outputs),
        ]
        for name, unit in model.units().items()
    }
    falling = FallingWidths(model, (4, 3))
    for phase, floor in ((0, 4), (1, 3), (2, 2)):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        bits = {name: quantizer.bits for name, quantizer in model.named_modules() if hasattr(quantizer, "bits")}
        moved = falling.enter(phase, [images(16)])
        for name, unit in model.units().items():
            found = [unit.weight_quantizer.bits if hasattr(unit, "weight_quantizer") else None]
            found += [output.bits for output in unit.outputs]
            assert found == [each if each is None else max(each, floor) for each in widths[name]], name
        changed = {name for name, quantizer in model.named_modules() if name in bits and quantizer.bits != bits[name]}
        assert changed
        steps = {name for name, p in model.named_parameters() if any(p is each for each in moved)}
        assert steps == {f"{name}.step" for name in changed}
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) != (name in steps), name
    torch.testing.assert_close(
        model.unit("first").weight_quantizer.step, calibrated(2, 3).unit("first").weight_quantizer.step, rtol=0, atol=0
    )  # the weights have not moved, so that calibration finds what it found


@pytest.mark.usefixtures("tiny_models")
def test_a_run_says_its_widths_and_resumes_to_the_bit_at_every_boundary(tmp_path):
    config = two_bits(keep_checkpoints=1, averaging=0.5)
    events = []
    train(config, tiny_dataset(), tmp_path / "whole", report=events.append)
    stages = [(e.stage, e.widths, e.epoch) for e in events if isinstance(e, StageEvent)]
    assert stages == [
        ("fp32", "", 0),
        ("calibrate", "", 0),
        ("qat", "8 bits", 0),
        ("calibrate", "", 0),
        ("qat", "4 bits", 1),
        ("calibrate", "", 0),
        ("qat", "the final widths", 2),
        ("deploy", "", 0),
    ]
    out, session = tmp_path / "run", 0

    def said(stage, epoch):
        return lambda event: isinstance(event, StageEvent) and (event.stage, event.epoch) == (stage, epoch)

    def ended(epoch):
        return lambda event: isinstance(event, EpochEvent) and (event.stage, event.epoch) == ("qat", epoch)

    stops = [is_step("qat", 1, 2), ended(1), said("calibrate", 0), said("qat", 1), is_step("qat", 2, 1), said("qat", 2)]
    for session, stop in enumerate(stops):
        with pytest.raises(TrainingInterrupted):
            train(config, tiny_dataset(), out, resume=session > 0, report=interrupt_at(stop))
    train(config, tiny_dataset(), out, resume=True)
    for name in (FINAL, "checkpoint-qat-0003.safetensors", "checkpoint-deploy-0001.safetensors"):
        assert_same_tensors(out / name, tmp_path / "whole" / name)
    final = tensors_in(out / FINAL)
    step = final["model.body.conv2.weight_quantizer.step"]
    codes = torch.round(final["model.body.conv2.weight"] / step.view(-1, 1, 1, 1))
    assert float(codes.clamp(-2, 1).ne(0).float().mean()) > 0.2  # 2-bit steps of their own, not a range of 8 bits


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"progressive": (8, 5)}, "schedule.progressive is 5; choose one of 2, 3, 4, 8"),
        ({"progressive": (4, 8)}, r"schedule.progressive is \[4, 8\]; widths have to fall, as in \[8, 4\]"),
        (
            {"progressive": (8, 4), "epochs": 4, "frozen_epochs": 2},
            "has 2 widths before the final ones, and there are 2 l",
        ),
        # Calibrated alone, a network would keep the first width, which is none that it is exported at.
        (
            {"progressive": (8,), "epochs": 0, "frozen_epochs": 0},
            "has 1 widths before the final ones, and there are 0 l",
        ),
    ],
)
def test_widths_that_make_no_sense_are_refused(schedule, message):
    with pytest.raises(TrainingError, match=message):
        ScheduleConfig(**schedule)


def test_settings_that_do_not_go_with_it_are_refused():
    schedule = ScheduleConfig(progressive=(8, 4))
    with pytest.raises(
        TrainingError, match="schedule.progressive ends at 4 bits, and no final width is below that; lea"
    ):
        TrainConfig(quant=QuantConfig(weight_bits=4, act_bits=4), schedule=schedule)
    for key in ("damping", "freezing"):
        with pytest.raises(
            TrainingError, match=f"quant.{key} is 0.1 and schedule.progressive .8, 4.; where widths change"
        ):
            TrainConfig(quant=QuantConfig(weight_bits=2, **{key: 0.1}), schedule=schedule)


@pytest.mark.usefixtures("tiny_models")
def test_with_each_width_watches_and_an_average_begin_anew(tmp_path, monkeypatch):
    """Calibration moves step sizes by far, and an average of what it replaced has no part in the next one."""
    begun, counted = [], []

    class Watch(SizeWatch):
        def __init__(self, network):
            super().__init__(network)
            if isinstance(network, QuantizedModel):
                begun.append(sorted({unit.weight_quantizer.bits for unit in weighted_units(network)}))

    class Average(WeightAverage):
        def update(self, step):
            counted.append(step)
            super().update(step)

    monkeypatch.setattr(session, "SizeWatch", Watch)
    monkeypatch.setattr(state, "WeightAverage", Average)
    train(two_bits(averaging=0.9), tiny_dataset(), tmp_path)
    assert begun == [[8], [4, 8], [2, 8], [2, 8]]  # qat, its second and third width, deploy
    steps = len(counted) // 3
    assert steps > 1 and counted == 3 * list(range(steps))


def weighted_units(network):
    return [unit for unit in network.units().values() if isinstance(unit, WeightedUnit)]
