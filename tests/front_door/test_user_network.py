"""A run of the user's own network, from the command line: trained, exported, checked, and what is executed is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from calling import TINY, Call

NET = """
from torch import nn

def make(num_classes, channels):
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes),
    )
"""


def test_all_commands_with_a_users_network(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    executing = f"Executing {tmp_path}/net.py (model.name is net.py:make)"
    outcome = call("train", "--model", "net.py:make", "--method", "lsq", *TINY)
    assert outcome.code == 0, outcome.err
    assert outcome.err.startswith(executing)
    run = "runs/digits-net-make-lsq-w4a4-seed0"
    for command in (["export", run], ["check", run], ["train", "--resume", "--out", run]):
        outcome = call(*command)
        assert outcome.code == 0, outcome.err + outcome.out
        assert outcome.err.startswith(executing)
    Path("net.py").unlink()
    assert call("export", run).error == (
        f"Error: model.name is 'net.py:make', and net.py is no file in {tmp_path}; check the path."
    )


def test_what_a_users_file_does_wrong_leaves_nothing(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("def make():\n    return 1 / 0\n")
    error = call("train", "--model", "net.py:make", *TINY).error
    assert error == f"Error: net.py:make failed: ZeroDivisionError: division by zero ({tmp_path}/net.py, line 2)"
    assert sorted(os.listdir(tmp_path)) in (["net.py"], ["__pycache__", "net.py"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "net.py"], "name the function or class that makes the network: net.py:NAME"),
        (["--model", "alexnet"], "alexnet cannot take images of 8x8 pixels; the smallest it takes are 63x63."),
        (["--model", "mnasnet0_5", "--weights", "V7"], "weights is 'V7'; mnasnet0_5 has IMAGENET1K_V1, DEFAULT."),
        (["--weights", "DEFAULT"], "weights is 'DEFAULT', but resnet8 has no published weights"),
        (["--init", "a.pth"], "No such option '--init'"),
    ],
)
def test_networks_and_weights_that_are_refused(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in call("train", *arguments, *TINY).error
    assert os.listdir(tmp_path) == []


UNWRITABLE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(torch.special.bessel_j0(self.conv(x).mean((2, 3))))
"""


def test_what_onnx_cannot_write_is_refused_before_it_is_trained(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(UNWRITABLE)
    error = call("train", "--model", "net.py:Net", "--out", "run", *TINY).error
    assert "special_bessel_j0: torch.onnx cannot write this island" in error
    assert not Path("run").exists()
