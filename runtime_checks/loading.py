"""Load time and peak memory of models, each measured in fresh processes that do nothing else."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mecdeploy.runtime_checks.errors import CheckError

_CHILD = Path(__file__).with_name("loading_child.py")


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Medians over the processes of one model. seconds: from the path to a session that is ready, one each, in order.

    baseline, loaded, peak: bytes of peak memory of the process: when it has imported numpy and onnxruntime, when the
    session is ready, and after one run.
    """

    seconds: tuple[float, ...]
    baseline: int
    loaded: int
    peak: int

    @property
    def median(self) -> float:
        """Seconds to load."""
        return statistics.median(self.seconds)

    @property
    def memory(self) -> int:
        """Bytes that the model took on top of the process, at most."""
        return self.peak - self.baseline


def measure_loading(
    models: Mapping[str, Path],
    feeds: Mapping[str, Mapping[str, NDArray[Any]]],
    *,
    threads: int = 1,
    repeats: int = 3,
) -> dict[str, LoadReport]:
    """Load every model `repeats` times, the models taking turns, each time in a new process.

    models: name -> path. feeds: name -> input name -> array, of which only types and shapes matter.
    The first process of a model may have to read the file from the disk; the median leaves that out from three on.
    Raises CheckError if a process ends without an answer, with its last words.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, path in models.items():
            found[name].append(_load_once(name, path, feeds[name], threads))
    return {name: _summarize(answers) for name, answers in found.items()}


def _load_once(name: str, path: Path, feed: Mapping[str, NDArray[Any]], threads: int) -> dict[str, Any]:
    inputs = {key: [array.dtype.str, list(array.shape)] for key, array in feed.items()}
    question = json.dumps({"model": str(path.absolute()), "threads": threads, "inputs": inputs})
    # -P: this folder's modules shall not stand in for others of the same name.
    command = [sys.executable, "-P", str(_CHILD)]
    child = subprocess.run(command, input=question, capture_output=True, text=True)
    if child.returncode == 0:
        answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        return answer
    if child.returncode < 0:
        hint = " The machine may have no memory left for it." if child.returncode == -signal.SIGKILL else ""
        reason = f"was ended by {signal.Signals(-child.returncode).name}.{hint}"
    else:
        words = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        reason = f"failed: {words[-1][:300]}"
    raise CheckError(f"{name}: the process that measures its load time and memory {reason}")


def _summarize(answers: list[dict[str, Any]]) -> LoadReport:
    memory = {key: int(statistics.median(answer[key] for answer in answers)) for key in ("baseline", "loaded", "peak")}
    return LoadReport(seconds=tuple(answer["seconds"] for answer in answers), **memory)
