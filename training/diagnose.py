"""Where a network first stops being finite, and what of it says the same whatever it is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mecdeploy.training.model import QuantizedModel
from mecdeploy.training.quantizers import ActivationQuantizer, QTensor
from mecdeploy.training.units import WeightedUnit
from mecdeploy.training.weight_quantizers import WeightQuantizer


def first_non_finite(network: nn.Module, forward: Callable[[], object]) -> str:
    """One clause that names the first place that is NaN or infinite: a step size or weight, an activation, a buffer.

    forward: runs the batch in question through `network`; its own errors are swallowed, as the network is broken.
    Buffers come last because the forward pass that failed has already spoiled BatchNorm's statistics.
    """
    steps = _step_size_names(network)
    for name, parameter in sorted(network.named_parameters(), key=lambda item: item[0] not in steps):
        if not _finite(parameter):
            kind = "step size" if name in steps else "parameter"
            return f"the {kind} {name.removeprefix('body.')} is not finite"
    unit = _first_activation(network, forward)
    if unit is not None:
        return f"the activations of {unit} went non-finite first"
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point() and not _finite(buffer):
            return f"the buffer {name.removeprefix('body.')} is not finite"
    return "every weight, step size and activation of this batch is finite"


def constant_outputs(network: nn.Module, forward: Callable[[], object]) -> list[str]:
    """Units whose output is one code everywhere, of every image of the batch: nothing goes through them any more.

    forward: as for first_non_finite. Empty for a network that is not quantised.
    """
    if not isinstance(network, QuantizedModel):
        return []
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(unit: Any, _: Any, result: Any) -> None:
            results = result if isinstance(result, tuple) else (result,)
            codes = [value.codes for value in results if isinstance(value, QTensor)]
            if len(unit.outputs) and all(bool((tensor == tensor.flatten()[0]).all()) for tensor in codes):
                found.append(name)

        return hook

    _pass_watched(network, watch, forward)
    return found


def parameter_names(network: nn.Module) -> dict[int, str]:
    """What each parameter is called in a message, by its id: "conv1's weight step size", or its path."""
    names = {id(parameter): name.removeprefix("body.") for name, parameter in network.named_parameters()}
    if isinstance(network, QuantizedModel):
        for unit, module in reversed(network.units().items()):  # a step size that several share is the first one's
            for output in module.outputs:
                assert isinstance(output, ActivationQuantizer)
                names[id(output.step)] = f"{unit}'s output step size"
            if isinstance(module, WeightedUnit) and isinstance(module.weight_quantizer, WeightQuantizer):
                names[id(module.weight_quantizer.step)] = f"{unit}'s weight step size"
    return names


def _first_activation(network: nn.Module, forward: Callable[[], object]) -> str | None:
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, result: Any) -> None:
            if not found and not all(_finite(tensor) for tensor in _tensors(result)):
                found.append(name)

        return hook

    _pass_watched(network, watch, forward)
    return found[0] if found else None


def _pass_watched(
    network: nn.Module,
    watch: Callable[[str], Callable[[nn.Module, Any, Any], None]],
    forward: Callable[[], object],
) -> None:
    """One forward pass with watch(name) as forward hook of every unit, or layer of a network without units."""
    handles = [module.register_forward_hook(watch(name)) for name, module in _watched(network)]
    try:
        with torch.no_grad():
            forward()
    except (RuntimeError, ValueError):
        pass
    finally:
        for handle in handles:
            handle.remove()


def _watched(network: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    if isinstance(network, QuantizedModel):
        return list(network.units().items())
    return [(name, module) for name, module in network.named_modules() if name and not list(module.children())]


def _step_size_names(network: nn.Module) -> set[str]:
    if not isinstance(network, QuantizedModel):
        return set()
    steps = {id(step) for step in network.step_sizes()}
    return {name for name, parameter in network.named_parameters() if id(parameter) in steps}


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, QTensor):
        return [result.codes, result.scale]
    if isinstance(result, tuple | list):
        return [tensor for item in result for tensor in _tensors(item)]
    return []


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
