"""torch.compile in the live stages: it computes the same but for rounding, and nothing exact goes through it."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_config, tiny_dataset
from torch import Tensor, nn

from mecdeploy.training import compiling
from mecdeploy.training.compiling import CompiledNetwork, compiled
from mecdeploy.training.config import MecConfig, QuantConfig, ScheduleConfig, TrainConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.loop import train
from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.movement import DropoutUnit
from mecdeploy.training.state import State
from mecdeploy.training.stepping import Gradients

CPU = torch.device("cpu")
NEW_ENOUGH = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= compiling.OLDEST_TORCH


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
@pytest.mark.skipif(not NEW_ENOUGH, reason="needs a newer torch")
@pytest.mark.parametrize(
    "config",
    [
        tiny_config(mec=MecConfig(code=("features", "activations", "weights"))),
        tiny_config(method="pact"),  # its weights are dorefa's
        replace(tiny_config(method="lsq"), quant=QuantConfig(weight_bits=2, act_bits=2, weight_grid="midrise")),
    ],
    ids=["mec", "pact", "midrise"],
)
def test_a_compiled_step_is_a_step_but_for_rounding(config: TrainConfig) -> None:
    """Loss and every gradient of a step, from the same state.

    Sums in float32 are taken in another order: relative to a tensor's largest gradient 1e-3 leaves room for that
    through a few layers, and none for a wrong formula. A code at a tie may fall the other way; none does here.
    """
    dataset = tiny_dataset()
    found = []
    for compile in (False, True):
        state = State(config, dataset, CPU)
        state.quantize()
        state.task.network.train()
        for module in state.task.network.modules():
            if isinstance(module, DropoutUnit):
                module.eval()  # a compiled one draws other random numbers
        if compile:
            state.task.forward = compiled(state.task.network, CPU)
        batch = next(dataset.train.batches(16, seed=1, augment=False))
        loss = state.task.loss(batch, fraction=0.5, seed=3)
        loss.total.backward()
        gradients = {name: p.grad for name, p in state.task.network.named_parameters() if p.grad is not None}
        found.append((float(loss.total.detach()), gradients))
    (loss, gradients), (loss_compiled, gradients_compiled) = found
    assert loss_compiled == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == gradients_compiled.keys()
    for name, gradient in gradients.items():
        atol = 1e-3 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(gradients_compiled[name], gradient, rtol=0, atol=atol, msg=lambda m, n=name: n + m)


class Watched(nn.Module):
    """In place of a compiled network: counts its calls."""

    calls = 0

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *arguments: Tensor) -> Tensor:
        type(self).calls += 1
        assert not isinstance(self.network, QuantizedModel) or not any(u.frozen for u in self.network.units().values())
        assert self.network.training
        result: Tensor = self.network(*arguments)
        return result


def test_a_run_compiles_its_live_stages_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mecdeploy.training.stepping.compiled", lambda network, device: Watched(network))
    plain = train(tiny_config(), tiny_dataset(), tmp_path / "plain")
    assert Watched.calls == 0
    config = tiny_config(compile=True)
    result = train(config, tiny_dataset(), tmp_path / "run")
    steps = len(tiny_dataset().train) // config.schedule.batch_size
    schedule = config.schedule
    assert schedule.frozen_epochs > 0
    assert Watched.calls == steps * (schedule.fp_epochs + schedule.epochs - schedule.frozen_epochs)
    assert result.accuracy == plain.accuracy, "a network that is handed on is the network"


def test_a_look_at_a_broken_step_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled network knows nothing of the hooks that find where it breaks."""
    monkeypatch.setattr("mecdeploy.training.stepping.compiled", lambda network, device: Watched(network))
    state, dataset = State(tiny_config(compile=True), tiny_dataset(), CPU), tiny_dataset()
    gradients = Gradients(state)
    name, norm = next((n, m) for n, m in state.float_model.named_modules() if isinstance(m, nn.BatchNorm2d))
    norm.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    batch = next(dataset.train.batches(16, seed=1))
    before = Watched.calls
    found = gradients.culprit(lambda: gradients.forward(batch, fraction=0.0, seed=0))
    assert Watched.calls == before
    assert f"the activations of {name} went non-finite first" in found
    state.task.network.train()
    state.task.forward(torch.zeros(2, 1, 8, 8))
    assert Watched.calls == before + 1, "training goes on compiled"


def test_no_compiler_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.1+cpu")
    with pytest.raises(TrainingError, match=r"this is torch 2.14.1\+cpu; it needs torch 2.15 or newer"):
        compiled(nn.Linear(1, 1), CPU)
    monkeypatch.setattr(torch, "__version__", "2.15.0")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(TrainingError, match="schedule.compile is true, but there is no C.. compiler no-such-compiler"):
        compiled(nn.Linear(1, 1), CPU)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="there is no Triton"):
        compiled(nn.Linear(1, 1), torch.device("cuda"))


def test_what_cannot_be_compiled_is_said() -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise torch._dynamo.exc.Unsupported("a call that no graph can hold")

    network = CompiledNetwork(nn.Identity())
    network._compiled = Breaks()
    with pytest.raises(TrainingError, match="cannot compile this network .a call that no graph can hold.; set sched"):
        network(torch.zeros(1))

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("the network's own")

    network._compiled = Fails()
    with pytest.raises(ValueError, match="the network's own"):
        network(torch.zeros(1))


def test_settings_that_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="schedule.compile is true and quant.zero_point learned"):
        TrainConfig(quant=QuantConfig(zero_point="learned"), schedule=ScheduleConfig(compile=True))

    state = State(tiny_config(compile=True), tiny_dataset(), CPU)
    monkeypatch.setattr(type(state.world), "alone", False)
    with pytest.raises(TrainingError, match="set schedule.batch_norm to local, or schedule.compile to false"):
        Gradients(state)
