"""NNCF: INT8, calibrated, trained, exported through torch.onnx. `python nncf_int8.py FOLDER`, in its own venv."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import nncf
import torch
from network import SIDE, Network, fine_tune, load_into


def main() -> None:
    """Quantise, keep the logits, export."""
    folder, seed = Path(sys.argv[1]), 0
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    network = load_into(Network(), folder).eval()
    batches = torch.load(folder / "train.pt", weights_only=True)[:256].split(64)
    quantized = nncf.quantize(network, nncf.Dataset(batches))
    fine_tune(quantized, folder, epochs=1, seed=seed)
    images = torch.load(folder / "test.pt", weights_only=True)
    with torch.no_grad():
        torch.save(quantized(images), folder / "nncf.logits.pt")
    example = torch.zeros(1, 1, SIDE, SIDE)
    stripped = nncf.strip(quantized, example_input=example)
    torch.onnx.export(
        stripped,
        (example,),
        str(folder / "nncf.onnx"),
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    versions = {name: version(name) for name in ("nncf", "torch", "onnx")}
    (folder / "nncf.json").write_text(json.dumps({"versions": versions}))


main()
