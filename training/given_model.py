"""What a user hands to prepare, as a float32 copy of the network itself, on the CPU and in evaluation mode."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mecdeploy.training.errors import TrainingError

_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "OptimizedModule": "_orig_mod",
}
"""Modules of torch around a network, and where they keep it; by name, since importing them is slow."""


def own_copy(model: nn.Module) -> nn.Module:
    """A copy of the network inside torch's wrappers, in float32 on the CPU; the model given is not changed.

    Raises TrainingError for what is no module, for TorchScript, for weights that are not there, and for a module that
    cannot be copied.
    """
    network = _unwrapped(model)
    kind = type(network).__name__
    if not isinstance(network, nn.Module):
        raise TrainingError(f"the model is of type {kind}; give an nn.Module.")
    if isinstance(network, torch.jit.ScriptModule):
        raise TrainingError(f"{kind} is TorchScript, which cannot be traced; give the nn.Module that it was made from.")
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise TrainingError(f"{name} has no shape yet; run the model once on a batch of images first.")
        if tensor.device.type == "meta":
            raise TrainingError(f"{name} is on the meta device and has no values; load the model's weights first.")
    try:
        copied = copy.deepcopy(network, _computed_tensors(network))
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise TrainingError(
            f"{kind} cannot be copied ({type(error).__name__}: {reason[:200]}). copy.deepcopy(model) has to work: "
            "keep no locks or open files as attributes."
        ) from error
    return copied.cpu().float().eval()


def _computed_tensors(network: nn.Module) -> dict[int, Any]:
    """Copies of results that modules keep as attributes, which deepcopy refuses: pruned weights, the last features."""
    kept = [value for module in network.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return {id(tensor): tensor.detach().clone() for tensor in kept if not tensor.is_leaf}


def _unwrapped(model: Any) -> Any:
    kind = type(model)
    inner = _WRAPPERS.get(kind.__name__, "") if kind.__module__.startswith("torch.") else ""
    return _unwrapped(getattr(model, inner)) if inner else model
