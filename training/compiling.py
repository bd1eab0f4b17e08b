"""torch.compile for the live stages: elementwise chains become single kernels.

A compiled network is not exact: kernels may contract a product and a sum, or sum in another order. Training does not
mind, as it does not mind another batch. Whatever must be exact (evaluation, stage deploy, export) never runs compiled.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mecdeploy.training.errors import TrainingError


def compile_forward(network: nn.Module, device: torch.device) -> Callable[..., Any]:
    """The network's forward pass through torch.compile as one graph; compiled at the first call, in about a minute.

    Names and parameters of the network stay as they are. Raises TrainingError where a compiler is missing.
    """
    require_compiler(device)
    compiled: Callable[..., Any] = torch.compile(network, fullgraph=True, dynamic=False)
    return compiled


def require_compiler(device: torch.device) -> None:
    """Raise TrainingError where torch.compile has nothing to compile with: Triton for a GPU, C++ for a CPU."""
    if device.type == "cuda":
        missing = "" if importlib.util.find_spec("triton") else "Triton (the package triton)"
    else:
        compiler = os.environ.get("CXX", "g++")
        missing = (
            "" if shutil.which(compiler) else f"C++ compiler {compiler} (the environment variable CXX names another)"
        )
    if missing:
        raise TrainingError(f"schedule.compile is true, but there is no {missing}; install it, or set it to false.")
