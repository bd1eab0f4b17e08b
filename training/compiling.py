"""torch.compile for the live stages: chains of elementwise functions become single kernels.

A compiled network is not exact: its kernels may fuse a product with a sum, or add in another order. Live training does
not mind. What has to be exact (the final phase, evaluation, export) never runs compiled.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

import torch
from torch import Tensor, nn

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.model import QuantizedModel

OLDEST_TORCH = (2, 15)
"""torch 2.11 compiles wrong gradients of these networks; from here on a test compares them."""

_COMPILERS = ("torch._dynamo", "torch._inductor")
"""Modules whose exceptions say that something could not be compiled."""


class CompiledNetwork(nn.Module):
    """A network whose forward pass is compiled when it is first called. It shares the parameters of `network`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        # A quantised network is one graph; a user's own may have code in it that only Python can run.
        whole = isinstance(network, QuantizedModel)
        self._compiled = torch.compile(network, fullgraph=whole, dynamic=False)
        self._called = False

    def forward(self, *arguments: Any) -> Any:
        """What the network gives. Raises TrainingError if it cannot be compiled."""
        if self._called:
            return self._compiled(*arguments)
        try:
            result: Tensor = self._compiled(*arguments)
        except Exception as error:
            if not type(error).__module__.startswith(_COMPILERS):
                raise
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise TrainingError(
                f"torch.compile cannot compile this network ({reason.strip()}); set schedule.compile to false."
            ) from error
        self._called = True
        return result


def compiled(network: nn.Module, device: torch.device) -> CompiledNetwork:
    """The network behind torch.compile.

    Raises TrainingError where torch is too old, or there is no compiler: C++ for a CPU, else Triton.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise TrainingError(
            f"schedule.compile is true, but this is torch {torch.__version__}; it needs torch "
            f"{'.'.join(map(str, OLDEST_TORCH))} or newer. Upgrade torch, or set it to false."
        )
    if device.type == "cuda":
        missing = "" if importlib.util.find_spec("triton") else "Triton (the package triton)"
    else:
        compiler = os.environ.get("CXX", "g++")
        missing = "" if shutil.which(compiler) else f"C++ compiler {compiler} (the variable CXX names another)"
    if missing:
        raise TrainingError(f"schedule.compile is true, but there is no {missing}; install it, or set it to false.")
    return CompiledNetwork(network)
