"""QuantizedModel: units in execution order, and what can be read from a pass through them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from mecdeploy.training.config import QuantConfig
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.movement import DropoutUnit, FloatUnit
from mecdeploy.training.plans import LOGITS, PIXELS
from mecdeploy.training.quantizers import ActivationQuantizer, QTensor
from mecdeploy.training.recording import Recording
from mecdeploy.training.units import Unit, WeightedUnit
from mecdeploy.training.weight_quantizers import WeightQuantizer


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

    @overload
    def forward(self, pixels: Tensor) -> Tensor: ...

    @overload
    def forward(
        self, pixels: Tensor, code: Collection[str], layers: Collection[str] = ()
    ) -> tuple[Tensor, Recording]: ...

    def forward(
        self, pixels: Tensor, code: Collection[str] = (), layers: Collection[str] = ()
    ) -> Tensor | tuple[Tensor, Recording]:
        """uint8 [N, C, H, W] to logits float32 [N, classes].

        code: which of features, activations and weights (CODED_TENSORS) to return beside the logits, attached to the
        autograd graph; each costs a pass over its tensors. layers: names of the units whose activations and
        weights these are; empty for all.
        """
        x = self.quantize(pixels)
        return self._recorded(x, code, layers) if code else self.run(x)

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

    def values(
        self, x: QTensor, given: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Iterator[tuple[Unit, str, QTensor | Tensor]]:
        """Execute the program, yielding each unit's outputs by name and dropping each value after its last reader.

        given: stored codes by name; such a value is yielded as computed, and read by later units as given.
        """
        values: dict[str, Any] = {PIXELS: x}
        for index, step in enumerate(self.program):
            unit = self.unit(step.unit)
            result = unit(*(values[name] for name in step.reads))
            for name, value in zip(unit.output_names, result if isinstance(result, tuple) else (result,), strict=True):
                yield unit, name, value
                if name in given:
                    value = value.with_codes(given[name].to(value.codes.dtype) - value.zero_point)
                values[name] = value
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

    def islands(self) -> dict[str, FloatUnit]:
        """What is computed in float, by name: operators and why."""
        return {name: unit for name, unit in self.units().items() if isinstance(unit, FloatUnit)}

    def last_layer(self) -> str:
        """Name of the layer with weights that is last before the logits: what it reads are the features."""
        made = {name: step for step in self.program for name in self.unit(step.unit).output_names}
        step = made[LOGITS]
        while not isinstance(self.unit(step.unit), WeightedUnit):
            earlier = [made[name] for name in step.reads if name in made]
            if not earlier:
                raise TrainingError("the network has no layer with weights, and so no features to code.")
            step = max(earlier, key=self.program.index)
        return step.unit

    def freeze(self) -> None:
        """Enter the final phase: BatchNorm statistics stay, training computes the deployed arithmetic."""
        for unit in self.units().values():
            unit.frozen = True

    def step_sizes(self) -> list[nn.Parameter]:
        """All learned step sizes, those that several quantisers share once."""
        found = [module.step for module in self.modules() if isinstance(module, ActivationQuantizer | WeightQuantizer)]
        return list(dict.fromkeys(found))

    def clipping_steps(self) -> list[nn.Parameter]:
        """Those of them that stand for a clipping level of PACT, which decays."""
        found = [module.step for module in self.modules() if isinstance(module, ActivationQuantizer) and module.pact]
        return list(dict.fromkeys(found))

    def _recorded(self, x: QTensor, code: Collection[str], layers: Collection[str]) -> tuple[Tensor, Recording]:
        recording, logits = Recording(), None
        last = self.last_layer() if "features" in code else ""
        coded = next((step.reads[0] for step in self.program if step.unit == last), "")
        coded_units = set(layers) or {step.unit for step in self.program}
        coded_values = {value for name in coded_units for value in self.unit(name).output_names}
        for _, name, value in chain([(None, PIXELS, x)], self.values(x)):
            if name == LOGITS:
                logits = value
            elif "activations" in code and isinstance(value, QTensor) and name in coded_values:
                recording.activations[name] = value.dequantize()
            if name == coded:
                features = value.dequantize() if isinstance(value, QTensor) else value
                # A convolution may be the last layer (its features are pooled), or a layer over tokens.
                recording.features = features.flatten(2).mean(2) if features.dim() == 4 else features
        if "weights" in code:
            for name, unit in self.units().items():
                if isinstance(unit, WeightedUnit) and name in coded_units:
                    codes, step = unit.weight_quantizer(unit.weight)
                    recording.weights[name] = codes.flatten(1) * step.view(-1, 1)
        assert isinstance(logits, Tensor)
        return logits, recording

    @torch.no_grad()
    def integers(
        self, pixels: Tensor, given: Mapping[str, np.ndarray[Any, Any]] = MappingProxyType({})
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Stored uint8 codes of every unit output, real products and logits as float32, by name.

        Exact, so on the CPU only. pixels: uint8 [N, C, H, W]. given: stored codes of values that a float island makes:
        they are returned as computed here, and read by later units as given. Evaluation mode is set for the pass and
        restored.
        """
        if any(parameter.device.type != "cpu" for parameter in self.parameters()):
            raise TrainingError("integers() is exact on the CPU only; call model.cpu() first.")
        was_training = self.training
        try:
            self.eval()
            codes = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in given.items()}
            return {
                name: (value.stored() if isinstance(value, QTensor) else value).numpy()
                for unit, name, value in self.values(self.quantize(pixels), codes)
                if name == LOGITS or not isinstance(unit, DropoutUnit | FloatUnit)  # these have no integer kernel
            }
        finally:
            self.train(was_training)


def _attach(root: nn.Module, path: str, unit: Unit) -> None:
    """Put a unit at a dotted path, so that state dict keys read like the float model's."""
    *parents, leaf = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    for name, child in getattr(root, leaf, nn.Module()).named_children():
        unit.add_module(name, child)  # units of the same path's inside that came first
    root.add_module(leaf, unit)
