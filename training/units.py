"""Quantised units: one unit is one integer kernel at run time.

A unit in training mode fake-quantises with straight-through gradients. In evaluation mode, and in training once it is
frozen, it computes the deployed arithmetic of `deployed.py`. Units pass QTensors to each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mecdeploy.training import deployed
from mecdeploy.training.quantizers import ActivationQuantizer, QTensor, WeightQuantizer


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A convolution's or pool's window: (height, width) pairs."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int = 1


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
    """Conv2d or Linear with its BatchNorm, its activation (in the output quantiser) and its bias.

    geometry: None for a Linear. Without an output quantiser the unit returns float logits.
    """

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        batch_norm: nn.BatchNorm2d | None,
        weight_bits: int,
        output: ActivationQuantizer | None,
        output_names: tuple[str, ...],
    ) -> None:
        super().__init__([] if output is None else [output], output_names)
        self.geometry = convolution_geometry(layer) if isinstance(layer, nn.Conv2d) else None
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.batch_norm = batch_norm
        self.weight_quantizer = WeightQuantizer(weight_bits, self.weight.shape[0])
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
        if self.output is None:
            return accumulator.float() * (x.scale * scale)
        return deployed.requantize(accumulator, x.scale * scale, self.output)

    def _training(self, x: QTensor, codes: Tensor, step: Tensor) -> QTensor | Tensor:
        # Both scales act on the weight, the smallest operand, instead of on the whole output.
        weight = codes * (x.scale * step).view(-1, *[1] * (codes.dim() - 1))
        if self.geometry is None:
            y = F.linear(x.codes, weight, self.bias)
        else:
            g = self.geometry
            y = F.conv2d(x.codes, weight, self.bias, g.stride, g.padding, g.dilation, g.groups)
        if self.batch_norm is not None:
            y = _batch_norm(y, self.batch_norm)
        return y if self.output is None else self.output(y)

    @torch.no_grad()
    def _absorb_negative_gamma(self, batch_norm: nn.BatchNorm2d) -> None:
        """Flip the weights of channels whose gamma is negative: BN(z; gamma, mean) = BN(-z; -gamma, -mean)."""
        assert batch_norm.running_mean is not None
        sign = torch.where(batch_norm.weight < 0, -1.0, 1.0)
        self.weight.mul_(sign.view(-1, 1, 1, 1))
        if self.bias is not None:
            self.bias.mul_(sign)
        batch_norm.weight.mul_(sign)
        batch_norm.running_mean.mul_(sign)


class AddUnit(Unit):
    """Residual sum, quantised once for each precision at which it is read."""

    def forward(self, a: QTensor, b: QTensor) -> QTensor | tuple[QTensor, ...]:
        """One QTensor per output quantiser."""
        if self.simulates_deployment:
            results = tuple(deployed.add(a, b, output) for output in self.outputs)  # type: ignore[arg-type]
        else:
            total = torch.addcmul(a.dequantize(), b.codes, b.scale)
            results = tuple(output(total) for output in self.outputs)
        return results[0] if len(results) == 1 else results


class GlobalAveragePoolUnit(Unit):
    """Mean over height and width, [N, C, H, W] -> [N, C, 1, 1]."""

    def forward(self, x: QTensor) -> QTensor:
        """Requantise the mean."""
        assert self.output is not None
        if self.simulates_deployment:
            return deployed.global_average(x, self.output)
        pooled: QTensor = self.output(x.dequantize().mean((2, 3), keepdim=True))
        return pooled


class MaxPoolUnit(Unit):
    """Maximum of codes: the input's quantisation passes through."""

    def __init__(
        self, kernel: tuple[int, int], geometry: Geometry, ceil_mode: bool, output_names: tuple[str, ...]
    ) -> None:
        super().__init__([], output_names)
        self.kernel, self.geometry, self.ceil_mode = kernel, geometry, ceil_mode

    def forward(self, x: QTensor) -> QTensor:
        """[N, C, H, W] -> [N, C, H', W']."""
        g = self.geometry
        pooled = F.max_pool2d(x.codes, self.kernel, g.stride, g.padding, g.dilation, self.ceil_mode)
        return x.with_codes(pooled)


class FlattenUnit(Unit):
    """[N, C, H, W] -> [N, C * H * W], codes untouched."""

    def forward(self, x: QTensor) -> QTensor:
        """Flatten all but the batch."""
        return x.with_codes(x.codes.flatten(1))


class DropoutUnit(Unit):
    """Dropout while training on live BatchNorm; the identity once frozen or deployed. It has no kernel at run time."""

    def __init__(self, probability: float, output_names: tuple[str, ...]) -> None:
        super().__init__([], output_names)
        self.probability = probability

    def forward(self, x: QTensor) -> QTensor:
        """Drop codes, scaling the rest."""
        if self.simulates_deployment:
            return x
        return x.with_codes(F.dropout(x.codes, self.probability))


def _batch_norm(y: Tensor, batch_norm: nn.BatchNorm2d) -> Tensor:
    """BatchNorm in training with gamma kept positive, updating the running statistics."""
    return F.batch_norm(
        y,
        batch_norm.running_mean,
        batch_norm.running_var,
        batch_norm.weight.abs(),
        batch_norm.bias,
        training=True,
        momentum=0.1 if batch_norm.momentum is None else batch_norm.momentum,
        eps=batch_norm.eps,
    )


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """Torch's scalar-or-pair as a (height, width) pair."""
    if isinstance(value, int):
        return (value, value)
    return (int(value[0]), int(value[1]))


def convolution_geometry(layer: nn.Conv2d) -> Geometry:
    """The geometry of a Conv2d whose padding is numeric zeros (prepare refuses the others)."""
    assert not isinstance(layer.padding, str)
    return Geometry(
        stride=pair(layer.stride), padding=pair(layer.padding), dilation=pair(layer.dilation), groups=layer.groups
    )
