"""One small network through other tools and ours: size, kernels, agreement with PyTorch, latency.

    python -m benchmarks.comparison --venvs FOLDER

Each other tool runs in a virtual environment of its own (benchmarks/peers/), made in FOLDER by uv where it is missing,
with the newest releases. Its file is then measured here like ours: by onnxruntime alone. Every tool gets the same
network, trained here in full precision on scikit-learn's digits; those that train get one epoch. The logits of a tool's
own PyTorch model are compared bit for bit with those that onnxruntime computes from its file. Accuracies are in the
result file for sanity only: one epoch ranks nobody.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PEERS = Path(__file__).parent / "peers"
RESULT = Path(__file__).parent / "results" / "comparison.json"
# Tool -> (its script, what is installed beside torch, onnx and onnxscript).
TOOLS = {
    "brevitas": ("brevitas_qcdq.py", ("brevitas", "onnxoptimizer")),
    "nncf": ("nncf_int8.py", ("nncf", "ninja", "torchao")),
    "torchao": ("torchao_pt2e.py", ("torchao",)),
}
TRAINING_IMAGES = 1437
ROUNDS = 300
OURS, FLOAT = "mecdeploy", "fp32"


def write_data(folder: Path, seed: int) -> None:
    """Digits as images [N, 1, SIDE, SIDE], raw and normalised, and a network trained on them in full precision."""
    import numpy as np
    import torch
    from sklearn.datasets import load_digits

    from benchmarks.peers import network as peers

    digits = load_digits()
    pixels = torch.from_numpy(np.round(digits.images * 255 / 16))[:, None]
    pixels = torch.nn.functional.interpolate(pixels, (peers.SIDE, peers.SIDE), mode="bilinear").round()
    mean, std = round(float(pixels.mean())), float(pixels.std())
    images = ((pixels - mean) / std).float()
    labels = torch.from_numpy(digits.target).long()
    cut = TRAINING_IMAGES
    parts = {"train": images[:cut], "train_labels": labels[:cut], "test": images[cut:], "test_labels": labels[cut:]}
    for name, values in {**parts, "test_pixels": pixels[cut:].to(torch.uint8)}.items():
        torch.save(values.clone(), folder / f"{name}.pt")
    torch.save({"mean": mean, "std": std, "pixels": pixels[:cut].to(torch.uint8)}, folder / "input.pt")
    torch.manual_seed(seed)
    network = peers.Network(peers.Normalized())
    peers.fine_tune(network, folder, epochs=5, seed=seed, rate=0.05)
    torch.save(peers.folded(network).state_dict(), folder / "network.pt")


def run_peer(tool: str, folder: Path, venvs: Path) -> dict[str, Any]:
    """The tool's file and logits into the folder; its versions, and its last words if it fails."""
    script, packages = TOOLS[tool]
    venv = venvs / tool
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run(["uv", "venv", "-q", str(venv), "--python", sys.executable], check=True)
        every = [*packages, "torch", "onnx", "onnxscript", "setuptools"]
        subprocess.run(["uv", "pip", "install", "-q", "--python", str(python), *every], check=True)
    # NNCF compiles an extension at its first use; its own limit of a minute is short for a busy machine.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables = {**clean, "NNCF_EXTENSION_LOAD_TIMEOUT": "0", "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        [python, str(PEERS / script), str(folder)], env=variables, capture_output=True, text=True, cwd=folder
    )
    written = folder / f"{tool}.json"
    found: dict[str, Any] = json.loads(written.read_text()) if written.is_file() else {}
    if done.returncode:
        found["failed"] = done.stderr.strip().splitlines()[-1][:300]
    return found


def write_ours(folder: Path, bits: int, seed: int) -> str:
    """The same network through `prepare`, `calibrate`, one epoch and `export`; its logits beside it, and its name."""
    import torch

    import mecdeploy
    from benchmarks.peers import network as peers

    known = torch.load(folder / "input.pt", weights_only=True)
    spec = mecdeploy.InputSpec.from_statistics(
        channels=1, height=peers.SIDE, width=peers.SIDE, mean=known["mean"], std=known["std"]
    )
    network = peers.load_into(peers.Network(), folder).eval()
    model = mecdeploy.prepare(network, mecdeploy.QuantConfig(weight_bits=bits, act_bits=bits), spec)
    mecdeploy.calibrate(model, known["pixels"][:256].split(64))
    labels = torch.load(folder / "train_labels.pt", weights_only=True)
    peers.fine_tune(model, folder, epochs=1, seed=seed, data=(known["pixels"], labels))
    name = f"{OURS}-w{bits}a{bits}"
    with torch.no_grad():
        torch.save(model(torch.load(folder / "test_pixels.pt", weights_only=True)), folder / f"{name}.logits.pt")
    mecdeploy.export(model, out=folder / f"{name}.onnx")
    return name


def write_onnxruntime(folder: Path) -> None:
    """The fp32 file, and onnxruntime's own static quantisation of it with 8-bit and with packed 4-bit weights."""
    import onnx
    import torch
    from onnxruntime.quantization import QuantType

    from benchmarks.peers import network as peers
    from mecdeploy.float_baseline import float_onnx
    from mecdeploy.static_int8 import name_global_pools, write_static_int8

    network = peers.load_into(peers.Network(), folder).eval()
    proto = onnx.load_from_string(float_onnx(network, channels=1, height=peers.SIDE, width=peers.SIDE))
    name_global_pools(proto.graph)
    onnx.save(proto, folder / f"{FLOAT}.onnx")
    images = torch.load(folder / "train.pt", weights_only=True)[:256].numpy()
    for name, weights in (("onnxruntime-int8", QuantType.QInt8), ("onnxruntime-int4", QuantType.QInt4)):
        write_static_int8(folder / f"{FLOAT}.onnx", images, folder / f"{name}.onnx", weights=weights)
    with torch.no_grad():
        torch.save(network(torch.load(folder / "test.pt", weights_only=True)), folder / f"{FLOAT}.logits.pt")


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Size, storage, kernels, accuracy and agreement of one file, by onnx and onnxruntime alone."""
    import numpy as np
    import torch

    from benchmarks.timing import count_convolutions
    from mecdeploy.runtime_checks.runtime import open_session

    path = folder / f"{name}.onnx"
    row: dict[str, Any] = {
        "file_bytes": path.stat().st_size,
        "bits_per_weight": bits_per_weight(path),
        **count_convolutions(path),
    }
    images = torch.load(folder / f"{'test_pixels' if name.startswith(OURS) else 'test'}.pt", weights_only=True)
    labels = torch.load(folder / "test_labels.pt", weights_only=True).numpy()
    session = open_session(path, name, threads=1)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    row["accuracy"] = round(float((logits.argmax(1) == labels).mean()), 4)
    twin = folder / f"{name}.logits.pt"
    if twin.is_file():
        expected = torch.load(twin, weights_only=True).numpy()
        difference = np.abs(logits.astype(np.float64) - expected)
        row |= {
            "logits_compared": int(logits.size),
            "logits_different": int((logits != expected).sum()),
            "largest_difference": float(difference.max()),
            "largest_logit": float(np.abs(expected).max()),
            "classes_different": int((logits.argmax(1) != expected.argmax(1)).sum()),
        }
    return row


def bits_per_weight(path: Path) -> float:
    """Mean over all weights (constants of two and more axes) of the bits that one takes in the file."""
    import math

    import onnx
    from onnx import TensorProto, helper

    packed = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT2: 2, TensorProto.UINT2: 2}
    model = onnx.load(path)
    constants = list(model.graph.initializer)
    constants += [
        a.t for node in model.graph.node if node.op_type == "Constant" for a in node.attribute if a.HasField("t")
    ]
    weights = [tensor for tensor in constants if len(tensor.dims) > 1]
    bits = [
        packed.get(tensor.data_type) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in weights
    ]
    counts = [math.prod(tensor.dims) for tensor in weights]
    return round(sum(b * n for b, n in zip(bits, counts, strict=True)) / sum(counts), 2)


def add_latency(rows: dict[str, dict[str, Any]], folder: Path, rounds: int) -> None:
    """Of each file over fp32 within a round, one image at a time, one thread, all files taking turns."""
    import torch

    from benchmarks.timing import quartiles, ratios
    from mecdeploy.runtime_checks.latency import compare_latency
    from mecdeploy.runtime_checks.runtime import open_session

    files = {name: folder / f"{name}.onnx" for name in rows}
    test, pixels = (
        torch.load(folder / f"{name}.pt", weights_only=True)[:1].numpy() for name in ("test", "test_pixels")
    )
    feeds = {
        name: {open_session(path, name).get_inputs()[0].name: pixels if name.startswith(OURS) else test}
        for name, path in files.items()
    }
    reports = compare_latency(files, feeds, threads=1, rounds=rounds, warmup=10)
    for name, report in reports.items():
        rows[name]["microseconds"] = quartiles([seconds * 1e6 for seconds in report.rounds])
        rows[name]["ratio_to_fp32"] = ratios(report.rounds, reports[FLOAT].rounds)


def main() -> None:
    """Run every tool, measure every file, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, required=True, help="folder of the other tools' environments")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from benchmarks.environment import describe_environment, scheduling

    environment = describe_environment(seed=arguments.seed, threads=1) | {"scheduling": scheduling()}
    arguments.venvs.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, arguments.seed)
        write_onnxruntime(folder)
        ours = [write_ours(folder, bits, arguments.seed) for bits in (8, 4, 2)]
        peers = {tool: run_peer(tool, folder, arguments.venvs.absolute()) for tool in TOOLS}
        tools = [FLOAT, "onnxruntime-int8", "onnxruntime-int4", *TOOLS, *ours]
        rows = {tool: measured(tool, folder) for tool in tools if (folder / f"{tool}.onnx").is_file()}
        add_latency(rows, folder, arguments.rounds)
    for tool, found in peers.items():
        rows[tool] = {**rows.get(tool, {}), **found}
    for tool, row in rows.items():
        print(tool, json.dumps(row), flush=True)
    result = {"environment": environment, "rounds": arguments.rounds, "tools": rows}
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
