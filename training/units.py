"""Quantised units: one unit is one integer kernel at run time.

A unit in training mode fake-quantises with straight-through gradients. In evaluation mode, and in training once it is
frozen, it computes the deployed arithmetic of `deployed.py`. Units pass QTensors to each other.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training import deployed, elementwise
from mecdeploy.training.geometry import Geometry
from mecdeploy.training.plans import Layer
from mecdeploy.training.quantizers import ActivationQuantizer, QTensor, add, batch_norm
from mecdeploy.training.weight_quantizers import make_weight_quantizer


class Unit(nn.Module):
    """What every unit has: its output quantisers (none where codes pass through or logits leave) and their names.

    output_names: one name per output, the name of the tensor that holds these integers in the exported file.
    """

    def __init__(self, outputs: list[ActivationQuantizer], output_names: tuple[str, ...]) -> None:
        super().__init__()
        self.outputs = nn.ModuleList(outputs)
        self.output_names = output_names
        self.frozen = False

    @property
    def simulates_deployment(self) -> bool:
        """Whether forward computes the deployed arithmetic."""
        return self.frozen or not self.training

    @property
    def output(self) -> ActivationQuantizer | None:
        """The only output quantiser, or None where there is none."""
        quantizer = self.outputs[0] if len(self.outputs) else None
        assert quantizer is None or isinstance(quantizer, ActivationQuantizer)
        return quantizer


class WeightedUnit(Unit):
    """Convolution or linear layer with its BatchNorm, its activation (in the output quantiser) and its bias.

    layer: its weights, copied. Without an output quantiser the unit returns real products: logits, or what float
    operators read. A linear layer works on the last axis, [N, ..., I] -> [N, ..., O].
    """

    def __init__(
        self,
        layer: Layer,
        batch_norm: nn.BatchNorm2d | nn.BatchNorm1d | None,
        weight_bits: int,
        output: ActivationQuantizer | None,
        output_names: tuple[str, ...],
    ) -> None:
        super().__init__([] if output is None else [output], output_names)
        self.geometry = layer.geometry
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.batch_norm = batch_norm
        self.weight_quantizer = make_weight_quantizer(weight_bits, self.weight.shape[0])
        if batch_norm is not None:
            self._absorb_negative_gamma(batch_norm)

    def forward(self, x: QTensor) -> QTensor | Tensor:
        """Codes in, codes (or float logits) out."""
        codes, step = self.weight_quantizer(self.weight)
        return self._deployed(x, codes, step) if self.simulates_deployment else self._training(x, codes, step)

    def folded(self, step: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Weight scale [O] and bias codes [O] as they are deployed; export reads these very numbers."""
        scale, bias = deployed.fold(step, self.bias, self.batch_norm, input_scale)
        return scale, deployed.bias_codes(bias, input_scale * scale)

    def _deployed(self, x: QTensor, codes: Tensor, step: Tensor) -> QTensor | Tensor:
        scale, bias = self.folded(step, x.scale)
        accumulator = deployed.accumulate(x, codes, bias, self.geometry)
        product_scale = deployed.per_channel(x.scale * scale, self.geometry)
        if self.output is None:
            return accumulator.float() * product_scale
        return deployed.requantize(accumulator, product_scale, self.output)

    def _training(self, x: QTensor, codes: Tensor, step: Tensor) -> QTensor | Tensor:
        # Both scales act on the weight, the smallest operand, instead of on the whole output.
        weight = codes * (x.scale * step).view(-1, *[1] * (codes.dim() - 1))
        if self.geometry is None:
            y = F.linear(x.codes, weight, self.bias)
        else:
            y = deployed.convolve(x.codes, weight, self.bias, self.geometry)
        if self.batch_norm is None:
            return y if self.output is None else self.output(y)
        return batch_norm(y, self.batch_norm) if self.output is None else self.output.normalized(y, self.batch_norm)

    @torch.no_grad()
    def _absorb_negative_gamma(self, batch_norm: nn.BatchNorm2d | nn.BatchNorm1d) -> None:
        """Flip the weights of channels whose gamma is negative: BN(z; gamma, mean) = BN(-z; -gamma, -mean)."""
        assert batch_norm.running_mean is not None
        sign = torch.where(batch_norm.weight < 0, -1.0, 1.0)
        self.weight.mul_(sign.view(-1, *[1] * (self.weight.dim() - 1)))
        if self.bias is not None:
            self.bias.mul_(sign)
        batch_norm.weight.mul_(sign)
        batch_norm.running_mean.mul_(sign)


class AddUnit(Unit):
    """Residual sum, quantised once for each precision at which it is read."""

    def forward(self, a: QTensor, b: QTensor) -> QTensor | tuple[QTensor, ...]:
        """One QTensor per output quantiser."""
        outputs = cast("list[ActivationQuantizer]", list(self.outputs))
        if any(output.samples is not None for output in outputs):
            total = a.dequantize() + b.dequantize()
            results = tuple(output(total) for output in outputs)
        else:
            results = deployed.add(a, b, outputs) if self.simulates_deployment else add(a, b, outputs)
        return results[0] if len(results) == 1 else results


class ElementwiseUnit(Unit):
    """A function of single positions of one or two values: an entry of elementwise.ELEMENTWISE. Shapes broadcast."""

    def __init__(
        self, function: str, alpha: float, outputs: list[ActivationQuantizer], output_names: tuple[str, ...]
    ) -> None:
        super().__init__(outputs, output_names)
        self.function, self.alpha = function, alpha

    def forward(self, *inputs: QTensor) -> QTensor:
        """[N, ...] of each input -> [N, ...]."""
        assert self.output is not None
        if self.simulates_deployment:
            result: QTensor = elementwise.integer(self.function, inputs, self.output, self.alpha)
        else:
            result = self.output(elementwise.real(self.function, inputs, self.alpha))
        return result


class GlobalAveragePoolUnit(Unit):
    """Mean over height and width, [N, C, H, W] -> [N, C, 1, 1]."""

    def forward(self, x: QTensor) -> QTensor:
        """Requantise the mean."""
        assert self.output is not None
        if self.simulates_deployment:
            return deployed.global_average(x, self.output)
        pooled: QTensor = self.output(x.dequantize().mean((2, 3), keepdim=True))
        return pooled


class AveragePoolUnit(Unit):
    """Mean over windows, [N, C, H, W] -> [N, C, H', W']. include_pad: whether padded places count."""

    def __init__(
        self,
        kernel: tuple[int, int],
        geometry: Geometry,
        include_pad: bool,
        outputs: list[ActivationQuantizer],
        output_names: tuple[str, ...],
    ) -> None:
        super().__init__(outputs, output_names)
        self.kernel, self.geometry, self.include_pad = kernel, geometry, include_pad

    def forward(self, x: QTensor) -> QTensor:
        """Requantise the means."""
        assert self.output is not None
        if self.simulates_deployment:
            return deployed.average(x, self.kernel, self.geometry, self.include_pad, self.output)
        padding = self.geometry.symmetric_padding or (0, 0)
        real = F.avg_pool2d(
            x.dequantize(), self.kernel, self.geometry.stride, padding, count_include_pad=self.include_pad
        )
        pooled: QTensor = self.output(real)
        return pooled
