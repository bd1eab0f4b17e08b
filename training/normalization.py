"""Per-channel normalisation of the image, folded into the layers that read raw pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mecdeploy.training.errors import TrainingError
from mecdeploy.training.input_spec import InputSpec
from mecdeploy.training.plans import PIXELS, Layer, Plans, Value


def fold_normalization(plans: Plans, spec: InputSpec) -> None:
    """Let every layer that reads pixels expect (pixel - pixel_zero_point) * pixel_scale, not (pixel - mean) / std.

    With k = 1 / (pixel_scale * std) and t = (pixel_zero_point - mean) / std, both per channel, (pixel - mean) / std is
    k * ((pixel - pixel_zero_point) * pixel_scale) + t: weights take the factor k, the bias the sum of weights times t.
    That is exact wherever a window lies inside the image. Where it reaches into the padding, the float network has 0
    there and the deployed one the pixel_zero_point, which stands for t: the two differ by the padded taps times t.
    Changes the plans in place. Raises TrainingError where something else than a convolution reads the pixels.
    """
    if not spec.mean:
        return
    for plan in dict.fromkeys(plans.readers(PIXELS)):  # several ways may lead to one layer
        channels = _channels_of(plan.inputs[0], spec.channels)
        if plan.kind != "weighted" or plan.layer is None or plan.layer.geometry is None or channels is None:
            raise TrainingError(
                f"{plan.name} reads the pixels, and only a convolution can take in a normalisation per channel. Set "
                "model.mean and model.std to one value for all channels, or begin the network with a convolution."
            )
        plan.layer = fold_layer(plan.layer, spec, channels)


def _channels_of(value: Value, count: int) -> list[int] | None:
    """Which channel of the image each channel of a value is; None where its second axis holds something else."""
    plan = value.plan
    if plan is None:
        return list(range(count))
    if plan.kind == "concat":
        parts = [_channels_of(source, count) for source in plan.inputs]
        if plan.options["axis"] == 1:
            return None if None in parts else [channel for part in parts if part is not None for channel in part]
        return parts[0] if all(part == parts[0] for part in parts) else None
    if plan.kind not in ("slice", "max_pool", "dropout"):
        return None
    channels = _channels_of(plan.inputs[0], count)
    if plan.kind != "slice" or plan.options["axis"] != 1 or channels is None:
        return channels
    return channels[plan.options["start"] : plan.options["stop"] : plan.options["step"]]


def fold_layer(layer: Layer, spec: InputSpec, channels: Sequence[int] = ()) -> Layer:
    """A convolution that reads raw pixels, with the difference between both normalisations in its weights and bias.

    channels: which channel of the image each of the layer's input is; all of them in their order where left out.
    """
    assert layer.geometry is not None
    mean, std = torch.tensor(spec.mean, dtype=torch.float64), torch.tensor(spec.std, dtype=torch.float64)
    factor = 1.0 / (spec.pixel_scale * std)
    offset = (spec.pixel_zero_point - mean) / std
    weight = layer.weight.double()
    outputs, inputs = weight.shape[:2]
    # Input channel i of output o is channel group(o) * inputs + i of what the layer reads.
    group = torch.arange(outputs) // (outputs // layer.geometry.groups)
    channel = torch.tensor(channels or range(spec.channels))[group[:, None] * inputs + torch.arange(inputs)]
    bias = (weight * offset[channel][:, :, None, None]).sum((1, 2, 3))
    if layer.bias is not None:
        bias = bias + layer.bias.double()
    scaled = weight * factor[channel][:, :, None, None]
    return replace(layer, weight=scaled.to(layer.weight.dtype), bias=bias.to(layer.weight.dtype))
