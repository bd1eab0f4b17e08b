"""The result file of a finished study: what `mecdeploy compare` came to, with every run's figures.

    mecdeploy compare --config benchmarks/studies/NAME.toml --out studies/NAME
    python -m benchmarks.studies studies/NAME

writes benchmarks/results/study-NAME.json. It reads no image and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from benchmarks.environment import commit

STUDIES, RESULTS = Path(__file__).parent / "studies", Path(__file__).parent / "results"
METHODS = (
    ("mec", "lsq"),
    ("mec", "pact"),
    ("mec", "fp32"),
    ("two-views", "two-views-only"),
    ("distillation-mec", "distillation"),
    ("unlabelled-mec", "unlabelled"),
)
"""One method, and what it is compared with, seed by seed: what targets speak of, what differs by the term alone."""


def collect(study: Path) -> dict[str, Any]:
    """The result, JSON-able. Raises SystemExit for a study that has not finished."""
    summary = json.loads((study / "summary.json").read_text())
    if summary["failures"] or summary["finished"] < summary["runs"] or summary["untested"]:
        sys.exit(
            f"{study}: {summary['finished']} of {summary['runs']} runs are finished and tested; run compare again."
        )
    records = _lines(study / "results.jsonl")
    tests = {test["name"]: test for test in _lines(study / "test.jsonl")}
    measures = {found["name"]: found["values"] for found in _lines(study / "measures.jsonl")}
    runs = [
        {
            **{key: record[key] for key in ("regime", "method", "bits", "seed", "epochs", "train_images")},
            "validation": record["accuracy"],
            "by_epoch": [epoch["validation_accuracy"] for epoch in record["history"]],
            **({"test": tests[record["name"]]["accuracy"]} if record["name"] in tests else {}),
            **({"measures": measures[record["name"]]} if record["name"] in measures else {}),
        }
        for record in records
    ]
    return {
        "environment": _environment(records),
        "study": tomllib.loads((STUDIES / f"{study.name}.toml").read_text()),
        "test_images": next((test["images"] for test in tests.values()), None),
        "rows": summary["rows"],
        "measured": summary["measured"],
        "pairs": pairs(runs),
        "runs": runs,
    }


def pairs(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """METHODS at each regime and width, on the images that were held back for last: points, with the interval."""
    from mecdeploy.study.statistics import paired_difference

    found = []
    for regime, bits in dict.fromkeys((run["regime"], run["bits"]) for run in runs if run["bits"]):
        for method, against in METHODS:
            own, other = (
                {
                    run["seed"]: 100 * run.get("test", run["validation"])
                    for run in runs
                    if (run["regime"], run["method"]) == (regime, name) and run["bits"] in (bits, "")
                }
                for name in (method, against)
            )
            difference = paired_difference(own, other)
            if difference is not None:
                low_high = None if difference.interval is None else list(difference.interval)
                found.append(
                    {
                        "regime": regime,
                        "bits": bits,
                        "method": method,
                        "against": against,
                        "n": difference.n,
                        "mean": difference.mean,
                        "interval": low_high,
                    }
                )
    return found


def _environment(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the study's last run, with the date of each end."""
    environment = records[-1]["environment"]
    dates = sorted(record["date"] for record in records)
    return {
        "date": dates[-1][:10],
        "began": dates[0],
        "ended": dates[-1],
        "cpu": environment["cpu"],
        "cpu_features": [],
        "cores": environment["cores"],
        "threads": environment["threads"],
        "device": environment["gpu"] or "cpu",
        "versions": {name: version.partition("+")[0] for name, version in environment["versions"].items()},
        "collected_at_commit": commit(),
        "seeds": sorted({record["seed"] for record in records}),
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def main() -> None:
    """Write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the folder that compare wrote, named like its settings file")
    study = parser.parse_args().study
    path = RESULTS / f"study-{study.name}.json"
    path.write_text(json.dumps(collect(study), indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
