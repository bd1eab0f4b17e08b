"""What ours is compared with: the fp32 network as ONNX, and onnxruntime's own static int8 of that file."""

from __future__ import annotations

from pathlib import Path

import onnx
from torch import nn

from mecdeploy.float_baseline import float_onnx
from mecdeploy.static_int8 import name_global_pools, write_static_int8

__all__ = ["name_global_pools", "write_float", "write_static_int8"]


def write_float(model: nn.Module, side: int, path: Path) -> None:
    """The fp32 network as torch.onnx writes it: float input [N, 3, side, side], float logits [N, classes]."""
    proto = onnx.load_from_string(float_onnx(model.eval(), channels=3, height=side, width=side))
    name_global_pools(proto.graph)
    path.write_bytes(proto.SerializeToString())
