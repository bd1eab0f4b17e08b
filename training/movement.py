"""Units that move or hand on values without rounding them, and the two ends of a float island."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from mecdeploy.training.geometry import Geometry
from mecdeploy.training.quantizers import QTensor
from mecdeploy.training.units import Unit


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
        padding = g.symmetric_padding
        assert padding is not None  # PyTorch's pools have no other
        return x.with_codes(F.max_pool2d(x.codes, self.kernel, g.stride, padding, g.dilation, self.ceil_mode))


class ReshapeUnit(Unit):
    """[N, ...] -> [N, *shape], codes untouched."""

    def __init__(self, shape: tuple[int, ...], output_names: tuple[str, ...]) -> None:
        super().__init__([], output_names)
        self.shape = shape

    def forward(self, x: QTensor) -> QTensor:
        """Keep the batch, lay out the rest as `shape`."""
        return x.with_codes(x.codes.reshape(len(x.codes), *self.shape))


class TransposeUnit(Unit):
    """Axes in another order, the batch first. permutation: as torch.permute takes it."""

    def __init__(self, permutation: tuple[int, ...], output_names: tuple[str, ...]) -> None:
        super().__init__([], output_names)
        self.permutation = permutation

    def forward(self, x: QTensor) -> QTensor:
        """[N, ...] -> [N, ...]."""
        return x.with_codes(x.codes.permute(self.permutation))


class SliceUnit(Unit):
    """Every step-th code from start up to stop along an axis that is not the batch's."""

    def __init__(self, axis: int, start: int, stop: int, step: int, output_names: tuple[str, ...]) -> None:
        super().__init__([], output_names)
        self.axis, self.start, self.stop, self.step = axis, start, stop, step

    def forward(self, x: QTensor) -> QTensor:
        """[N, ...] -> [N, ...]."""
        chosen = (*[slice(None)] * self.axis, slice(self.start, self.stop, self.step))
        return x.with_codes(x.codes[chosen])


class ConcatUnit(Unit):
    """Codes of several values of one scale side by side along an axis that is not the batch's."""

    def __init__(self, axis: int, output_names: tuple[str, ...]) -> None:
        super().__init__([], output_names)
        self.axis = axis

    def forward(self, *inputs: QTensor) -> QTensor:
        """[N, ...] of each input -> [N, ...]."""
        first = inputs[0]
        codes = torch.cat([x.codes for x in inputs], self.axis)
        qmin, qmax = min(x.qmin for x in inputs), max(x.qmax for x in inputs)
        return QTensor(codes, first.scale, first.zero_point, qmax, qmin)


class DropoutUnit(Unit):
    """Dropout while training on live BatchNorm; the identity once frozen or deployed. It has no kernel at run time."""

    def __init__(self, probability: float, output_names: tuple[str, ...]) -> None:
        super().__init__([], output_names)
        self.probability = probability

    def forward(self, x: QTensor | Tensor) -> QTensor | Tensor:
        """Drop codes or reals, scaling the rest."""
        if self.simulates_deployment:
            return x
        if isinstance(x, QTensor):
            return x.with_codes(F.dropout(x.codes, self.probability))
        return F.dropout(x, self.probability)


class QuantizeUnit(Unit):
    """Reals to codes: where an integer unit reads what a float island made."""

    def forward(self, x: Tensor) -> QTensor:
        """clamp(round(x / step) + zero_point), [N, ...]: QuantizeLinear computes it as training does."""
        assert self.output is not None
        quantized: QTensor = self.output(x)
        return quantized


class DequantizeUnit(Unit):
    """Codes to reals: the logits of a network that does not end in a linear layer."""

    def forward(self, x: QTensor) -> Tensor:
        """(code - zero_point) * scale, [N, ...]."""
        return x.dequantize()


class FloatUnit(Unit):
    """An island: operators without an integer kernel, computed in float by PyTorch and by onnxruntime.

    module: takes reals, returns a tuple. asks_for_batch_size: its first argument is the pixels, of which it reads the
    size alone. operators, reason: what it computes, and why in float.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        asks_for_batch_size: bool,
        operators: tuple[str, ...],
        reason: str,
        output_names: tuple[str, ...],
    ) -> None:
        super().__init__([], output_names)
        self.module, self.asks_for_batch_size = module, asks_for_batch_size
        self.operators, self.reason = operators, reason

    def forward(self, *inputs: QTensor | Tensor) -> Any:
        """One tensor for each output name."""
        reals = [x.dequantize() if isinstance(x, QTensor) else x for x in inputs]
        results: tuple[Tensor, ...] = self.module(*reals)
        return results if len(results) > 1 else results[0]
