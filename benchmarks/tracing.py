"""Which tracer sees more networks, torch.fx or torch.export, over torchvision's and timm's classifiers.

    pip install timm && python -m benchmarks.tracing

The shortest-named classifier of every module of torchvision.models and timm.models, on the meta device (no weights are
made), in evaluation mode; torch.export gets a free batch size, which torch.fx always leaves. A network that cannot be
made on the meta device counts for neither.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "tracing.json"


def networks() -> list[tuple[str, str, Callable[[], Any], int]]:
    """(collection, name, constructor, image side) of every network."""
    import timm
    import torchvision.models as zoo

    found: list[tuple[str, str, Callable[[], Any], int]] = []
    for name in _one_of_each_module(zoo.list_models(module=zoo), zoo.get_model_builder):
        extra = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
        found.append(("torchvision", name, lambda n=name, e=extra: zoo.get_model(n, weights=None, **e), 299))
    for name in _one_of_each_module(timm.list_models(), timm.model_entrypoint):
        found.append(("timm", name, lambda n=name: timm.create_model(n, pretrained=False), 0))
    return found


def _one_of_each_module(names: list[str], builder: Callable[[str], Any]) -> list[str]:
    shortest: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (len(name), name)):
        shortest.setdefault(builder(name).__module__, name)
    return sorted(shortest.values())


def trace_both(make: Callable[[], Any], side: int) -> dict[str, Any] | None:
    """Whether each tracer got through, its time or its error's first line; None where there is no network."""
    import torch

    try:
        with torch.device("meta"):
            model = make().eval()
    except Exception as error:
        print(f"  not made: {error}", flush=True)
        return None
    side = side if side in (299,) and type(model).__name__ == "Inception3" else _side(model)
    image = torch.zeros(2, 3, side, side, device="meta")
    batch = torch.export.Dim("batch")
    tracers: dict[str, Callable[[], Any]] = {
        "torch.fx": lambda: torch.fx.symbolic_trace(model),
        "torch.export": lambda: torch.export.export(model, (image,), dynamic_shapes=({0: batch},), strict=False),
    }
    found: dict[str, Any] = {}
    for name, tracer in tracers.items():
        start = time.perf_counter()
        try:
            tracer()
            found[name] = {"traced": True, "seconds": round(time.perf_counter() - start, 2)}
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            found[name] = {"traced": False, "error": f"{type(error).__name__}: {reason[:160]}"}
    return found


def _side(model: Any) -> int:
    size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    return int(size[-1])


def main() -> None:
    """Trace everything and write the result file."""
    import logging

    import torch

    from benchmarks.environment import describe_environment

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    results: dict[str, dict[str, Any]] = {}
    for collection, name, make, side in networks():
        print(collection, name, flush=True)
        found = trace_both(make, side)
        if found is not None:
            results.setdefault(collection, {})[name] = found
    summary = {
        collection: {"networks": len(rows)}
        | {tracer: sum(row[tracer]["traced"] for row in rows.values()) for tracer in ("torch.fx", "torch.export")}
        for collection, rows in results.items()
    }
    print(json.dumps(summary, indent=2))
    environment = describe_environment(seed=0, threads=torch.get_num_threads())
    result = {"environment": environment, "summary": summary, "networks": results}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
