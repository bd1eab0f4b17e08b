"""torchao: INT8 by PT2E with the x86 quantizer, then torch.onnx. `python torchao_pt2e.py FOLDER`, in its own venv."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
from network import SIDE, Network, load_into
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e


def main() -> None:
    """Quantise, keep the logits, export."""
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = load_into(Network(), folder).eval()
    batch = torch.export.Dim("batch", min=1, max=4096)
    example = (torch.zeros(2, 1, SIDE, SIDE),)
    captured = torch.export.export(network, example, dynamic_shapes=({0: batch},)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(captured, quantizer)
    for images in torch.load(folder / "train.pt", weights_only=True)[:256].split(64):
        prepared(images)
    quantized = convert_pt2e(prepared)
    images = torch.load(folder / "test.pt", weights_only=True)
    with torch.no_grad():
        torch.save(quantized(images), folder / "torchao.logits.pt")
    versions = {name: version(name) for name in ("torchao", "torch", "onnx", "onnxscript")}
    (folder / "torchao.json").write_text(json.dumps({"versions": versions}))
    torch.onnx.export(
        quantized,
        example,
        str(folder / "torchao.onnx"),
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        opset_version=21,
        dynamo=True,
        external_data=False,
    )


main()
