"""Tables of the studies that compare methods."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.markdown import Result, measured_on, table

LEAST_GAIN = {"W2A2": 1.0, "W2A4": 1.0, "W4A4": 0.5}
"""Points that MEC was to gain over LSQ and over PACT: asked for before anything was measured."""
FARTHEST_BELOW_FLOAT = 0.2
LARGEST_SHARE = 0.05
MEASURES = {
    "activation_entropy": "entropy of activations, bits",
    "weight_entropy": "entropy of weights, bits",
    "feature_effective_rank": "effective rank of features",
    "feature_coding_rate": "coding rate, nats",
    "feature_spread_ratio": "within / between classes",
    "hessian_eigenvalue": "top Hessian eigenvalue",
    "hessian_normalized_eigenvalue": "the same, filters of norm 1",
    "hessian_normalized_trace": "trace, filters of norm 1",
}


def study(result: Result) -> str:
    """Accuracy of each method and width, with the paired difference on test images."""
    baseline = result["study"]["study"]["baseline"]
    regimes = any(row["regime"] for row in result["rows"])
    head = ["method", "bits", "runs", "validation, %", "test, %", f"test against {baseline}, points"]
    rows = []
    for row in result["rows"]:
        cells = [
            row["method"],
            row["bits"],
            f"{row['validation']['n']}",
            _spread(row["validation"]),
            _spread(row["test"]),
            _difference(row["test_difference"]),
        ]
        rows.append((row["regime"], *cells) if regimes else tuple(cells))
    if regimes:
        head.insert(0, "regime")
    images = f"\nMean ± standard deviation over seeds; {result['test_images']:,} test images; 95 % intervals.\n"
    return table(tuple(head), rows, left=3 if regimes else 2) + images + measured_on(result)


def measures(result: Result) -> str:
    """What was measured of the runs beside their accuracy, and how it differs from the baseline."""
    baseline = result["study"]["study"]["baseline"]
    known = [key for key in MEASURES if any(key in row["values"] for row in result["measured"])]
    tables = []
    for what in ("values", "differences"):
        rows = [
            (row["method"], row["bits"], *(_digits(row[what].get(key)) for key in known))
            for row in result["measured"]
            if row[what]
        ]
        tables.append(table(("method", "bits", *(MEASURES[key] for key in known)), rows, left=2))
    return f"{tables[0]}\nPaired differences to {baseline}, with 95 % intervals:\n\n{tables[1]}{measured_on(result)}"


def targets(result: Result, share: float) -> str:
    """Each target beside what was measured. share: of a training step that the objective takes, 0..1."""
    rows = []
    for pair in result["pairs"]:
        if pair["against"] == "fp32":
            if pair["bits"] == "W4A4":
                rows.append(_target("MEC W4A4 less full precision", -FARTHEST_BELOW_FLOAT, pair))
        else:
            name = f"MEC {pair['bits']} less {pair['against'].upper()}"
            rows.append(_target(name, LEAST_GAIN[pair["bits"]], pair))
    rows.append(
        (
            "share of a training step, %",
            f"at most {100 * LARGEST_SHARE:g}",
            f"{100 * share:.1f}",
            "met" if share <= LARGEST_SHARE else "**missed**",
        )
    )
    return table(("points of accuracy, ResNet-20, CIFAR-10 (JPEG)", "target", "measured", ""), rows, left=1)


TERM_ALONE = {
    ("mec", "lsq"): "features, one view",
    ("two-views", "two-views-only"): "features, two augmented views",
    ("distillation-mec", "distillation"): "features, beside distillation",
    ("unlabelled-mec", "unlabelled"): "features against the teacher's, beside distillation, no labels",
}
"""Pairs of methods that differ by the coding term and by nothing else."""


STUDENT_6 = 2.5706
"""Student's t of 5 degrees of freedom at 97.5 %."""


def pooled(results: Iterable[Result], method: str, against: str) -> dict[str, Any]:
    """A pair over six runs of studies that differ by their seeds alone, on test images: points, with the interval."""
    differences = []
    for result in results:
        points = {(run["method"], run["seed"]): 100 * run["test"] for run in result["runs"]}
        seeds = sorted({seed for _, seed in points})
        differences += [points[method, seed] - points[against, seed] for seed in seeds]
    assert len(differences) == 6, "STUDENT_6 is for six"
    mean = statistics.mean(differences)
    half = STUDENT_6 * statistics.stdev(differences) / len(differences) ** 0.5
    return {"mean": mean, "interval": [mean - half, mean + half], "method": method, "against": against, "n": 6}


def term_alone(results: dict[str, Result]) -> str:
    """What the coding term adds at two bits to a run that is the same in all else. results: images -> a study."""
    rows = [
        (images, TERM_ALONE[pair["method"], pair["against"]], str(pair["n"]), _difference(pair))
        for images, result in results.items()
        for pair in result["pairs"]
        if (pair["method"], pair["against"]) in TERM_ALONE and pair["bits"] == "W2A2"
    ]
    return table(("training images", "coded", "pairs", "with the term less without, points"), rows, left=2)


def _target(name: str, least: float, pair: dict[str, Any]) -> tuple[str, str, str, str]:
    return name, f"at least {least:+g}", _difference(pair), "met" if pair["mean"] >= least else "**missed**"


def _spread(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['mean']:.2f}" if found["deviation"] is None else f"{found['mean']:.2f} ± {found['deviation']:.2f}"


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    interval = found["interval"]
    return f"{found['mean']:+.2f}" + ("" if interval is None else f" [{interval[0]:+.2f}, {interval[1]:+.2f}]")


def _digits(found: dict[str, Any] | None) -> str:
    """To three digits, whatever the unit; with its interval where it has one, else with its deviation."""
    if found is None:
        return ""
    if "interval" in found:
        interval = found["interval"]
        return f"{found['mean']:+.3g}" + ("" if interval is None else f" [{interval[0]:+.2g}, {interval[1]:+.2g}]")
    return f"{found['mean']:.3g}" + ("" if found["deviation"] is None else f" ± {found['deviation']:.2g}")
