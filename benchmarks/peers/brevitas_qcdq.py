"""brevitas: W4A4 with its own layers, trained, exported as QCDQ. `python brevitas_qcdq.py FOLDER`, in its own venv."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import brevitas.nn as qnn
import torch
from brevitas.export import export_onnx_qcdq
from brevitas.quant import (
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int32Bias,
    Uint8ActPerTensorFloat,
)
from network import SIDE, Layers, Network, fine_tune, load_into
from torch import nn

BITS = 4


class QuantLayers(Layers):
    """First and last layer, residual sums and the pool at 8 bits, the rest at 4, as ours."""

    def conv(self, inputs: int, outputs: int, kernel: int, stride: int, *, first: bool = False) -> nn.Module:
        """Weights per channel, an int32 bias."""
        return qnn.QuantConv2d(
            inputs,
            outputs,
            kernel,
            stride=stride,
            padding=kernel // 2,
            bias=True,
            weight_quant=Int8WeightPerChannelFloat,
            weight_bit_width=8 if first else BITS,
            bias_quant=Int32Bias,
            return_quant_tensor=True,
        )

    def relu(self) -> nn.Module:
        """Unsigned."""
        return qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat, bit_width=BITS, return_quant_tensor=True)

    def addend(self) -> nn.Module:
        """Signed, since a sum's addends are."""
        return qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat, bit_width=8, return_quant_tensor=False)

    def pooled(self) -> nn.Module:
        """Unsigned."""
        return qnn.QuantIdentity(act_quant=Uint8ActPerTensorFloat, bit_width=8, return_quant_tensor=True)

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        """8 bits."""
        return qnn.QuantLinear(
            inputs,
            outputs,
            bias=True,
            weight_quant=Int8WeightPerChannelFloat,
            weight_bit_width=8,
            bias_quant=Int32Bias,
            return_quant_tensor=False,
        )

    def input(self) -> nn.Module:
        """8 bits."""
        return qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat, bit_width=8, return_quant_tensor=True)


def main() -> None:
    """Train, keep the logits, export."""
    folder, seed = Path(sys.argv[1]), 0
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    network = load_into(Network(QuantLayers()), folder)
    fine_tune(network, folder, epochs=1, seed=seed)
    images = torch.load(folder / "test.pt", weights_only=True)
    with torch.no_grad():
        torch.save(network(images), folder / "brevitas.logits.pt")
    export_onnx_qcdq(
        network,
        torch.zeros(1, 1, SIDE, SIDE),
        str(folder / "brevitas.onnx"),
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    versions = {name: version(name) for name in ("brevitas", "torch", "onnx")}
    (folder / "brevitas.json").write_text(json.dumps({"versions": versions}))


main()
