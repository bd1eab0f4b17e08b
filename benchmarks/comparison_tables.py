"""The table of benchmarks.comparison: one small network through every tool."""

from __future__ import annotations

from benchmarks.markdown import Result, measured_on, table

NAMES = {
    "fp32": "fp32, torch.onnx",
    "onnxruntime-int8": "onnxruntime static, 8-bit weights",
    "onnxruntime-int4": "onnxruntime static, 4-bit weights",
    "brevitas": "brevitas W4A4, QCDQ",
    "nncf": "NNCF INT8, torch.onnx",
    "torchao": "torchao PT2E INT8, torch.onnx",
    "mecdeploy-w8a8": "mecdeploy W8A8",
    "mecdeploy-w4a4": "mecdeploy W4A4",
    "mecdeploy-w2a2": "mecdeploy W2A2",
}
HEAD = (
    "tool",
    "file, KB",
    "bits of a weight",
    "convolutions, integer",
    "in float",
    "logits that differ from its PyTorch",
    "largest difference",
    "latency, of fp32",
)


def comparison(result: Result) -> str:
    """One row a tool; a tool that wrote no file says why below."""
    rows, failed = [], []
    for tool, row in result["tools"].items():
        if "file_bytes" not in row:
            failed.append(f"{NAMES[tool]} wrote no file: {row['failed']}")
            continue
        different, largest = "no PyTorch model", ""
        if "logits_compared" in row:
            different = f"{row['logits_different']:,} of {row['logits_compared']:,}"
            largest = f"{row['largest_difference']:.2g}"
        rows.append(
            (
                NAMES[tool],
                f"{row['file_bytes'] / 1e3:.0f}",
                f"{row['bits_per_weight']:.1f}",
                str(row["integer_convolutions"]),
                str(row["float_convolutions"]),
                different,
                largest,
                f"{row['ratio_to_fp32']['median']:.2f}",
            )
        )
    versions = {name: version for row in result["tools"].values() for name, version in row.get("versions", {}).items()}
    tools = ", ".join(f"{name} {versions[name]}" for name in ("brevitas", "nncf", "torchao") if name in versions)
    notes = "".join(f"\n{note}\n" for note in failed)
    return table(HEAD, rows, left=1) + notes + measured_on(result).removesuffix(".\n") + f", {tools}.\n"
