"""How every table of the benchmarks is written; the standard library alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Result = dict[str, Any]


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]], *, left: int) -> str:
    """Markdown; the first `left` columns are words, the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def measured_on(result: Result) -> str:
    """One line on the machine and the versions."""
    found = result["environment"]
    features = f" ({', '.join(found['cpu_features'])})" if found["cpu_features"] else ""
    device = "" if found["device"] == "cpu" else f", {found['device']}"
    priority = ", at real-time priority" if found.get("scheduling") == "real-time" else ""
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("onnxruntime", "torch"))
    machine = f"{found['cpu']}{features}, {threads} of {found['cores']} cores{device}{priority}"
    return f"\n{found['date']}, {machine}, {versions}.\n"


def verdict(name: str, measured: float, limit: float, digits: int) -> tuple[str, str, str, str]:
    """A row that says whether a target is met, by the number as it was measured and not as it is printed."""
    return name, f"{limit:g}", f"{measured:.{digits}f}", "met" if measured <= limit else "**missed**"
