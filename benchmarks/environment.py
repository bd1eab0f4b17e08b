"""What a result was measured on: enough to compare two results, nothing that names a machine or its owner."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime", "numpy")
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")


def describe_environment(*, seed: int, threads: int, device: str = "cpu") -> dict[str, Any]:
    """CPU model, its integer instructions, usable cores, versions, the commit, seed, threads, device and date (UTC)."""
    import mecdeploy

    model, flags = _cpu()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": model,
        "cpu_features": [feature for feature in CPU_FEATURES if feature in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "device": _device_name(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "mecdeploy": mecdeploy.__version__,
        "commit": commit(),
        "seed": seed,
    }


def scheduling() -> str:
    """How the system shares its cores with this process: "real-time" runs before all others, "normal" takes turns."""
    if not hasattr(os, "sched_getscheduler"):
        return "unknown"
    return "real-time" if os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO) else "normal"


def load_average() -> float | None:
    """Processes wanting a core, mean of the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cpu() -> tuple[str, frozenset[str]]:
    """Model name and feature flags from /proc/cpuinfo; the platform's own word elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return fields.get("model name", platform.machine()), frozenset(fields.get("flags", "").split())


def _device_name(device: str) -> str:
    if device != "cuda":
        return "cpu"
    import torch

    return str(torch.cuda.get_device_name())


def commit() -> str | None:
    """Short hash of the checkout that was measured; None outside one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
