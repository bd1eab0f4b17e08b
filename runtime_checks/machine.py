"""Where a check ran: the processor, because integer kernels differ between processors, and the versions."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy
import onnx
import onnxruntime

_X86 = ("x86_64", "amd64", "i386", "i686")
_VNNI_FLAGS = ("avx512_vnni", "avx_vnni")
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """vnni: whether 8-bit products accumulate in int32 without saturating; None when that could not be read.

    note: what the processor means for exactness, empty when nothing.
    """

    model: str
    architecture: str
    vnni: bool | None
    note: str


def describe_cpu(cpuinfo: str | None = None, architecture: str | None = None) -> Cpu:
    """This machine's processor, or the one whose /proc/cpuinfo text and architecture are given."""
    machine = architecture if architecture is not None else platform.machine()
    text = cpuinfo if cpuinfo is not None else _read_cpuinfo()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    vnni = None
    if machine.lower() in _X86 and "flags" in fields:
        flags = fields["flags"].split()
        vnni = any(flag in flags for flag in _VNNI_FLAGS)
    model = fields.get("model name") or platform.processor() or "unknown"
    return Cpu(model=model, architecture=machine, vnni=vnni, note=_note(machine, vnni))


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float | None:
    """Processes wanting a core, mean of the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def versions() -> dict[str, str]:
    """Versions of everything this room computes with."""
    return {
        "onnxruntime": onnxruntime.__version__,
        "onnx": onnx.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def _note(machine: str, vnni: bool | None) -> str:
    if machine.lower() not in _X86:
        return (
            f"onnxruntime may add and pool in fixed point on {machine}; exactness is promised for x86-64, "
            "so differences of a step after Add and pooling units are expected here."
        )
    if vnni is False:
        return "This processor has no VNNI: 8-bit products saturate in int16 where 2 * max code * max |weight| > 32767."
    return ""


def _read_cpuinfo() -> str:
    try:
        return _CPUINFO.read_text(errors="replace")
    except OSError:
        return ""
