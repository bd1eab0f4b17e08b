"""Write brevitas-qcdq.onnx: a small network as brevitas exports it, 4 bits in int8 with a Clip.

    python tests/runtime_checks/foreign/make_brevitas.py

Needs an environment of its own with brevitas, onnx and onnxoptimizer (made with brevitas 0.13.4, torch 2.15): mecdeploy
needs none of it, and the tests read the committed file. Two convolutions have the uint8 codes of ReLUs on both sides;
the second reads its input through an int8 QuantIdentity of 4 bits, the linear layer through a flatten.
"""

from __future__ import annotations

from pathlib import Path

import brevitas.nn as qnn
import torch
from brevitas.export import export_onnx_qcdq
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Int32Bias
from torch import Tensor, nn

TARGET = Path(__file__).with_name("brevitas-qcdq.onnx")


class Network(nn.Module):
    """1x8x8 pixels to 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        weights = {"weight_bit_width": 4, "weight_quant": Int8WeightPerChannelFloat, "bias_quant": Int32Bias}
        self.pixels = qnn.QuantIdentity(bit_width=8, act_quant=Int8ActPerTensorFloat, return_quant_tensor=True)
        self.first = qnn.QuantConv2d(1, 8, 3, padding=1, bias=True, **weights)
        self.relu = qnn.QuantReLU(bit_width=4, return_quant_tensor=True)
        self.second = qnn.QuantConv2d(8, 8, 3, padding=1, stride=2, bias=True, **weights)
        self.signed = qnn.QuantIdentity(bit_width=4, act_quant=Int8ActPerTensorFloat, return_quant_tensor=True)
        self.third = qnn.QuantConv2d(8, 8, 1, bias=True, **weights)
        self.relu2 = qnn.QuantReLU(bit_width=4, return_quant_tensor=True)
        self.classifier = qnn.QuantLinear(8 * 16, 10, bias=True, **weights)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.relu(self.first(self.pixels(x)))
        x = self.relu2(self.third(self.signed(self.second(x))))
        return self.classifier(x.flatten(1))


def main() -> None:
    """Calibrate on noise: only the graph matters."""
    torch.manual_seed(0)
    network = Network().train()
    with torch.no_grad():
        for _ in range(5):
            network(torch.rand(16, 1, 8, 8))
    export_onnx_qcdq(
        network.eval(), args=torch.rand(1, 1, 8, 8), export_path=str(TARGET), opset_version=13, dynamo=False
    )


if __name__ == "__main__":
    main()
