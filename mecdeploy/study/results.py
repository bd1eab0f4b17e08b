"""results.jsonl: one record for each finished run, made from the run's own files, so that it can be made again."""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mecdeploy.config import flatten
from mecdeploy.study.plan import FINAL, RUNS, Cell
from mecdeploy.study.running import note_path
from mecdeploy.training.events import ACCURACY

RESULTS = "results.jsonl"
AXES = ("name", "regime", "method", "bits", "seed")
Record = Mapping[str, Any]
Group = tuple[str, str, str]
"""Regime, method and bits."""
_EPOCH = ("stage", "epoch", "train_accuracy", "validation_accuracy", "loss", "terms")


def record(out: Path, cell: Cell) -> dict[str, Any]:
    """What the finished run came to, JSON-able.

    accuracy: of the deployed arithmetic (of the float network, with method fp32) after the last epoch; accuracy_fp32:
    of the network it was quantised from; both over the validation images, 0..1. measure: what they are, agreement with
    the teacher where those images have no labels. seconds: training alone, over all sessions. settings: what it has on
    top of base, by dotted key.
    """
    from mecdeploy.training.checkpoint import read_header

    path = out / RUNS / cell.name / FINAL
    header = read_header(path)
    history = header["history"]
    seconds = sum(epoch["seconds"] for epoch in history)
    images = sum(epoch["images_per_second"] * epoch["seconds"] for epoch in history)
    finished = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    return {
        "name": cell.name,
        "regime": cell.regime,
        "method": cell.method,
        "bits": cell.bits,
        "seed": cell.seed,
        "start": cell.start,
        "accuracy": header["accuracy"],
        "accuracy_fp32": header["accuracy_fp32"],
        "measure": header.get("measure", ACCURACY),
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 1) if seconds else None,
        "epochs": len(history),
        "train_images": header["train_images"],
        "history": [{key: epoch[key] for key in _EPOCH} for epoch in history],
        "settings": dict(flatten(cell.settings)),
        "device": header["device"],
        "environment": _environment(note_path(out, cell.name)),
        "date": finished.isoformat(timespec="seconds"),
    }


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def by_seed(records: Sequence[Record], key: str, unit: float = 1.0) -> dict[Group, dict[int, float]]:
    """Group -> seed -> value of `key`, times `unit`, in the order of the records."""
    groups: dict[Group, dict[int, float]] = {}
    for found in records:
        group = groups.setdefault((found["regime"], found["method"], found["bits"]), {})
        group[found["seed"]] = unit * found[key]
    return groups


def partner_of(group: Group, baseline: str, groups: Collection[Group]) -> Group | None:
    """What a group is paired with: the baseline's at its width, or without bits (fp32), which serves every width."""
    regime, method, bits = group
    if method == baseline:
        return None
    return next((key for key in ((regime, baseline, bits), (regime, baseline, "")) if key in groups), None)


def _environment(note: Path) -> Any:
    """Versions and machine of the run's last session; None for a run of which nobody noted them."""
    return json.loads(note.read_text()) if note.is_file() else None
