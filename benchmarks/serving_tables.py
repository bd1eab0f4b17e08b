"""The table of what a server sustains."""

from __future__ import annotations

from benchmarks.markdown import Result, measured_on, table

ROWS = {
    "requests": ("requests", "{:,}"),
    "per_second": ("requests a second", "{:,.0f}"),
    "p50_ms": ("latency, median, ms", "{:.2f}"),
    "p99_ms": ("latency, 99th percentile, ms", "{:.2f}"),
    "refused": ("refused", "{}"),
    "wrong": ("answers with other logits than the file's", "{}"),
    "client_core_share": ("cores that the client takes", "{:.2f}"),
}


def load(result: Result) -> str:
    """Rate, latency and correctness by connections; memory below."""
    columns = result["connections"]
    head = ("one process, one thread", *(f"{count} connection{'s' * (count != '1')}" for count in columns))
    rows = [
        (words, *(form.format(measured[key]) for measured in columns.values())) for key, (words, form) in ROWS.items()
    ]
    memory, network, load_average = result["resident_mb"], result["network"], result["load_average"]
    note = (
        f"\nResNet-20 at {network['side']}x{network['side']}, W{network['bits']}A{network['bits']}; onnxruntime alone "
        f"takes {result['alone_ms']:.2f} ms for an image. The server's memory: {memory['first']:.1f} MB near the first "
        f"request, {memory['last']:.1f} MB after the last, {result['mb_per_100k_requests']:+.1f} MB for 100,000 "
        f"requests. Load of the machine before: {load_average}.\n"
    )
    return table(head, rows, left=1) + note + measured_on(result)
