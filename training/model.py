"""QuantizedModel: units in execution order, and what can be read from a pass through them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mecdeploy.training.config import CODED_TENSORS, QuantConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.patterns import PIXELS
from mecdeploy.training.quantizers import ActivationQuantizer, QTensor, WeightQuantizer
from mecdeploy.training.recording import Recording
from mecdeploy.training.units import DropoutUnit, Unit, WeightedUnit

LOGITS = "logits"


@dataclass(frozen=True)
class Step:
    """One line of the program: which unit, which values it reads (its output_names are what it writes)."""

    unit: str
    reads: tuple[str, ...]


class QuantizedModel(nn.Module):
    """A classifier made of units: raw uint8 pixels in, float logits out.

    train(): fake-quantised with straight-through gradients. eval(): the deployed arithmetic, integer for integer.
    program: steps in execution order. Made by prepare().
    """

    def __init__(self, program: list[Step], units: dict[str, Unit], spec: InputSpec, config: QuantConfig) -> None:
        super().__init__()
        self.program, self.spec, self.config = tuple(program), spec, config
        self.body = nn.Module()
        for name, unit in units.items():
            _attach(self.body, name, unit)
        self._last_read = {value: index for index, step in enumerate(program) for value in step.reads}

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [N, C, H, W] to logits float32 [N, classes]."""
        return self.run(self.quantize(pixels))

    def quantize(self, pixels: Tensor) -> QTensor:
        """Raw pixels, uint8 [N, C, H, W], as the program reads them. Raises TrainingError for any other dtype."""
        if pixels.dtype != torch.uint8:
            raise TrainingError(
                f"the quantised model takes raw uint8 pixels 0..255, not {pixels.dtype}; pass the image unnormalised."
            )
        return self.spec.quantized(pixels)

    def run(self, x: QTensor) -> Tensor:
        """Execute the program on quantised pixels; returns the logits."""
        return next(value for _, name, value in self.values(x) if name == LOGITS)  # type: ignore[return-value]

    def values(self, x: QTensor) -> Iterator[tuple[Unit, str, QTensor | Tensor]]:
        """Execute the program, yielding each unit's outputs by name and dropping each value after its last reader."""
        values: dict[str, Any] = {PIXELS: x}
        for index, step in enumerate(self.program):
            unit = self.unit(step.unit)
            result = unit(*(values[name] for name in step.reads))
            for name, value in zip(unit.output_names, result if isinstance(result, tuple) else (result,), strict=True):
                values[name] = value
                yield unit, name, value
            for name in step.reads:
                if self._last_read[name] == index:
                    values.pop(name, None)

    def unit(self, name: str) -> Unit:
        """The unit of this name."""
        unit = self.body.get_submodule(name)
        assert isinstance(unit, Unit)
        return unit

    def units(self) -> dict[str, Unit]:
        """All units by name, in execution order."""
        return {step.unit: self.unit(step.unit) for step in self.program}

    def freeze(self) -> None:
        """Enter the final phase: BatchNorm statistics stay, training computes the deployed arithmetic."""
        for unit in self.units().values():
            unit.frozen = True

    def step_sizes(self) -> list[nn.Parameter]:
        """All learned step sizes."""
        return [module.step for module in self.modules() if isinstance(module, ActivationQuantizer | WeightQuantizer)]

    @contextmanager
    def record(self, code: Collection[str] = CODED_TENSORS) -> Iterator[Recording]:
        """Collect what forwards inside produce, attached to the autograd graph.

        code: which of features, activations and weights; each costs a pass over its tensors.
        """
        recording = Recording()
        handles = []
        for name, unit in self.units().items():
            if unit.output_names == (LOGITS,) and "features" in code:
                handles.append(unit.register_forward_hook(_keep_features(recording)))
            elif "activations" in code:
                handles.append(unit.register_forward_hook(_keep_outputs(recording)))
            if isinstance(unit, WeightedUnit) and "weights" in code:
                handles.append(unit.weight_quantizer.register_forward_hook(_keep_weights(recording, name)))
        try:
            yield recording
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def integers(self, pixels: Tensor) -> dict[str, np.ndarray[Any, Any]]:
        """Stored uint8 codes of every unit output, and the float32 logits, by name; exact, so on the CPU only.

        pixels: uint8 [N, C, H, W]. Evaluation mode is set for the pass and restored.
        """
        if any(parameter.device.type != "cpu" for parameter in self.parameters()):
            raise TrainingError("integers() is exact on the CPU only; call model.cpu() first.")
        was_training = self.training
        try:
            self.eval()
            return {
                name: (value.stored() if isinstance(value, QTensor) else value).numpy()
                for unit, name, value in self.values(self.quantize(pixels))
                if not isinstance(unit, DropoutUnit)  # which has no kernel at run time
            }
        finally:
            self.train(was_training)


def _keep_features(recording: Recording) -> Any:
    def hook(_: Unit, inputs: tuple[Any, ...], __: Any) -> None:
        recording.features = inputs[0].dequantize()

    return hook


def _keep_outputs(recording: Recording) -> Any:
    def hook(unit: Unit, _: Any, result: Any) -> None:
        results = result if isinstance(result, tuple) else (result,)
        for name, value in zip(unit.output_names, results, strict=True):
            if isinstance(value, QTensor):
                recording.activations[name] = value.dequantize()

    return hook


def _keep_weights(recording: Recording, name: str) -> Any:
    def hook(_: nn.Module, __: Any, result: tuple[Tensor, Tensor]) -> None:
        codes, step = result
        recording.weights[name] = codes.flatten(1) * step.view(-1, 1)

    return hook


def _attach(root: nn.Module, path: str, unit: Unit) -> None:
    """Put a unit at a dotted path, so that state dict keys read like the float model's."""
    *parents, leaf = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(leaf, unit)
