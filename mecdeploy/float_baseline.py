"""The full-precision network as an ONNX file: what a demo compares size and latency with."""

from __future__ import annotations

import torch
from torch import nn

from mecdeploy.export.fragments import write_onnx

INPUT, OUTPUT = "image", "logits"


def float_onnx(model: nn.Module, *, channels: int, height: int, width: int) -> bytes:
    """A classifier as float32 ONNX, written by torch.onnx: "image", normalised [N, C, H, W], to "logits" [N, classes].

    model: in evaluation mode, on the CPU.
    """
    images = torch.zeros(2, channels, height, width)
    batch = torch.export.Dim("batch")
    proto = write_onnx(model, (images,), ({0: batch},), input_names=[INPUT], output_names=[OUTPUT])
    return bytes(proto.SerializeToString())
