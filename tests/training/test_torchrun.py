"""The real torchrun: a killed process is restarted, a killed job resumed, and the end is the same, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import assert_same_tensors

import mecdeploy

NETWORK = '''
"""A network for digits, whose training may be cut short by SIGKILL, in the first and in the second life of the job."""

import atexit
import os
import signal

from torch import nn

atexit.register(print, "the interpreter goes down")
KILL_ONE, KILL_ALL = 8, 7  # training steps of a life, of 5 steps an epoch
steps = 0


class Net(nn.Sequential):
    def forward(self, x):
        if self.training and os.environ.get("DIE"):
            kill()
        return super().forward(x)


def kill():
    global steps
    steps += 1
    life = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if life == "0" and steps == KILL_ONE and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if life == "1" and steps == KILL_ALL:
        os.kill(os.getppid(), signal.SIGKILL)  # torchrun
        os.kill(os.getpid(), signal.SIGKILL)


def make(num_classes):
    return Net(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.1), nn.Linear(8, num_classes),
    )
'''
SETTINGS = """
seed = 5
device = "cpu"
[data]
name = "digits"
[schedule]
fp_epochs = 3
epochs = 2
frozen_epochs = 1
batch_size = 256
"""
CHECKPOINTS = ("checkpoint-final.safetensors", "checkpoint-deploy-0001.safetensors")


def torchrun(*arguments: str, restarts: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes of the command line on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "-m", "mecdeploy", "train", *arguments]
    where = Path(mecdeploy.__file__).parents[1]  # the wheel that is tested, or the checkout
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(where), **environment}
    out = Path(arguments[arguments.index("--out") + 1])
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}, cwd=out.parent
    )


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    (folder / "net.py").write_text(NETWORK)
    settings = folder / "run.toml"
    settings.write_text(f'{SETTINGS}[model]\nname = "{folder / "net.py"}:make"\n')
    return settings


@pytest.fixture(scope="module")
def whole(settings):
    """A job of two processes that nothing happens to."""
    out = settings.parent / "whole"
    return out, torchrun("--config", str(settings), "--out", str(out))


def test_only_process_0_speaks_and_writes(whole):
    out, done = whole
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Next: mecdeploy export") == 1
    assert "full precision: 3 epochs of 5 steps on 2 processes, cpu" in done.stderr
    assert done.stderr.count("validation") == 5  # epochs, each once
    assert "Warning" not in done.stderr
    assert "the interpreter goes down" not in done.stdout  # a thread of gloo's could abort a process then
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_killed_process_is_restarted_and_a_killed_job_resumed(whole, settings):
    """First process 1 dies in epoch 2, then, in epoch 3, everything."""
    reference, _ = whole
    out = settings.parent / "killed"
    died = torchrun("--config", str(settings), "--out", str(out), restarts=1, DIE="yes")
    assert died.returncode == -9
    assert "resumed after epoch 1, step 0" in died.stderr  # torchrun's restart, by itself
    assert "checkpoint-fp32-0002.safetensors" in {path.name for path in out.iterdir()}
    assert not (out / CHECKPOINTS[0]).exists()
    resumed = torchrun("--resume", "--out", str(out))
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after epoch 2, step 0" in resumed.stderr
    for name in CHECKPOINTS:
        assert_same_tensors(out / name, reference / name)
