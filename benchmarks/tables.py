"""The tables of the documents, written from the result files between their markers.

    python -m benchmarks.tables            write them
    python -m benchmarks.tables --check    exit 1 if a document says something else than the results

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`. Only the standard library is used here, so that a
test can hold the documents to the results anywhere.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    batching_tables,
    comparison_tables,
    design_tables,
    loader_tables,
    serving_tables,
    step_tables,
    study_tables,
    zoo_tables,
)
from benchmarks.markdown import Result, measured_on, table, verdict

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
DOCUMENTS = (
    "docs/benchmarks.md",
    "docs/comparison.md",
    "docs/data.md",
    "docs/decisions.md",
    "docs/method-study.md",
    "docs/models.md",
    "docs/serving.md",
    "README.md",
)
MARKED = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
OPENING = re.compile(r"<!-- table:")

NETWORKS = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "resnet8": "ResNet-8",
    "resnet20": "ResNet-20",
}
MODELS = {"fp32": "fp32", "static_int8": "onnxruntime static int8"}
METHODS = {"lsq": "LSQ", "mec": "MEC"}
# What was asked for before anything was measured: (name, unit, limit).
LARGEST_FILE = {"w4a4": 6.3, "w2a2": 3.5}
LONGEST_EXPORT, LARGEST_EXPORT = 3.0, 3.0
LONGEST_RESNET50_EXPORT, LONGEST_INTERPRETER = 5.0, 20.0
SLOWEST_TO_STATIC, SLOWEST_TO_FLOAT = 1.05, 0.33
OBJECTIVE = "coding objective"
"""Its part in the shares of a training step."""


def load(name: str) -> Result:
    """One result file."""
    result: Result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def latency(result: Result) -> str:
    """Every model of every network."""
    head = ("network", "model", "file, MB", "load, ms", "median, ms", "quartiles, ms", "of fp32", "of static int8")
    rows = []
    for network, models in result["networks"].items():
        for model, row in models.items():
            time = row["milliseconds"]
            rows.append(
                (
                    NETWORKS[network],
                    label(model),
                    f"{row['file_bytes'] / 1e6:.2f}",
                    f"{row['load_milliseconds']['median']:.0f}",
                    f"{time['median']:.2f}",
                    f"{time['q1']:.2f} to {time['q3']:.2f}",
                    f"{row['ratio_to_fp32']['median']:.2f}",
                    f"{row['ratio_to_static_int8']['median']:.2f}",
                )
            )
    return table(head, rows, left=2) + measured_on(result)


def export(result: Result) -> str:
    """What one export costs."""
    head = ("network", "model", "seconds", "extra memory, MB", "of the fp32 weights")
    rows = [
        (
            NETWORKS[network],
            label(model),
            f"{cost['seconds']:.2f}",
            f"{cost['extra_megabytes']:.0f}",
            f"{cost['extra_over_fp32_weights']:.1f}",
        )
        for network, models in result["export"].items()
        for model, cost in models.items()
    ]
    return table(head, rows, left=2)


def check_cost(result: Result) -> str:
    """Export, interpreter and check at the median of their rounds; the check has no target."""
    head = ("at 224x224, W4A4, seconds", "target, at most", "measured", "", "quartiles", "extra memory, MB")
    export, interpreter, check = result["export"], result["interpreter"], result["check"]
    images = f"{NETWORKS[check['network']]}, {result['images']} images"
    name = f"export of {NETWORKS[export['network']]}"
    rows = [
        (*verdict(name, export["seconds"]["median"], LONGEST_RESNET50_EXPORT, 2), export),
        (*verdict(f"interpreter, {images}", interpreter["seconds"]["median"], LONGEST_INTERPRETER, 2), interpreter),
        (f"check, {images}", "", f"{check['seconds']['median']:.2f}", "", check),
    ]
    written = [
        (*row, f"{cost['seconds']['q1']:.2f} to {cost['seconds']['q3']:.2f}", f"{cost['extra_megabytes']:.0f}")
        for *row, cost in rows
    ]
    return table(head, written, left=1) + measured_on(result)


def targets(result: Result) -> str:
    """Each target of ResNet-18 beside what was measured."""
    models, costs = result["networks"]["resnet18"], result["export"]["resnet18"]
    low = {model: row for model, row in models.items() if model not in MODELS}

    def slowest(base: str) -> float:
        return max(float(row[f"ratio_to_{base}"]["median"]) for row in low.values())

    rows = [
        *(
            verdict(f"file, {label(model)}, MB", models[model]["file_bytes"] / 1e6, limit, 2)
            for model, limit in LARGEST_FILE.items()
        ),
        verdict("latency over static int8, slowest of ours", slowest("static_int8"), SLOWEST_TO_STATIC, 3),
        verdict("latency over fp32, slowest of ours", slowest("fp32"), SLOWEST_TO_FLOAT, 3),
        verdict("export, seconds, slowest of ours", max(cost["seconds"] for cost in costs.values()), LONGEST_EXPORT, 2),
        verdict(
            "export, extra memory over fp32 weights, largest of ours",
            max(cost["extra_over_fp32_weights"] for cost in costs.values()),
            LARGEST_EXPORT,
            2,
        ),
        verdict("float convolutions left, all of ours", sum(row["float_convolutions"] for row in low.values()), 0, 0),
    ]
    return table(("ResNet-18 at 224x224", "target, at most", "measured", ""), rows, left=1)


def cifar10(result: Result) -> str:
    """Accuracy of each run, and what the check of its file found."""
    head = ("run", "PyTorch, %", "onnxruntime, %", "integers compared", "different", "file, KB")
    rows = []
    for name, run in result["runs"].items():
        checked = "integers_compared" in run
        rows.append(
            (
                "fp32" if name == "fp32" else f"{METHODS[run['method']]} {label(name.partition('-')[2])}",
                f"{100 * run['accuracy_torch']:.2f}",
                f"{100 * run['accuracy_onnxruntime']:.2f}" if checked else "",
                f"{run['integers_compared']:,}" if checked else "",
                f"{run['integers_different']:,}" if checked else "",
                f"{run['file_bytes'] / 1e3:.0f}",
            )
        )
    trained = (
        f"\n{NETWORKS[result['model']]}, {result['data']}, seed {result['environment']['seed']}: {result['fp_epochs']} "
        f"epochs in full precision, then {result['epochs']} of each method from that one checkpoint."
    )
    gains = ", ".join(f"{label(width)} {100 * gain:+.2f}" for width, gain in gains_of_mec(result).items())
    trained += f" MEC less LSQ, in points: {gains}."
    note = f" {result['note']}" if result["note"] else ""
    return table(head, rows, left=1) + trained + note + "\n" + measured_on(result)


def gains_of_mec(result: Result) -> dict[str, float]:
    """Width -> accuracy of MEC less that of LSQ; negative where MEC is worse."""
    runs = result["runs"]
    widths = [name.partition("-")[2] for name in runs if name.startswith("lsq-")]
    return {width: runs[f"mec-{width}"]["accuracy_torch"] - runs[f"lsq-{width}"]["accuracy_torch"] for width in widths}


def method_targets(result: Result) -> str:
    """The study's targets; the share of a step was measured by itself."""
    return study_tables.targets(result, load("train_step")["shares_of_a_mec_step"][OBJECTIVE]["median"])


def study_table(name: str) -> dict[str, tuple[str, Callable[[Result], str]]]:
    """Those of one result of benchmarks.studies; one called ...-measures is about these alone."""
    if name.endswith("-measures"):
        return {name: (name, study_tables.measures)}
    measured = {f"{name}-measures": (name, study_tables.measures)} if load(name)["measured"] else {}
    return {name: (name, study_tables.study), **measured}


def term_alone(_: Result) -> str:
    """Pairs with and without the coding term, over several studies; the last of them is the source of the table."""
    tenth = [load(f"study-cifar10-{name}") for name in ("few", "objective", "teacher")]
    pairs = [pair for result in tenth for pair in result["pairs"]]
    hundredth = {"450": load("study-cifar10-hundredth"), "450, seeds 3 to 5": load("study-cifar10-hundredth-again")}
    both = [
        {**study_tables.pooled(hundredth.values(), method, against), "bits": "W2A2"}
        for method, against in (("mec", "lsq"), ("two-views", "two-views-only"))
    ]
    return study_tables.term_alone({"4,500": {"pairs": pairs}, **hundredth, "450, all six": {"pairs": both}})


def label(model: str) -> str:
    """A model's name as people write it."""
    return MODELS.get(model, model.upper())


# Table -> (its result file, how it is written).
TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "latency": ("latency", latency),
    "export": ("latency", export),
    "targets": ("latency", targets),
    "check-cost": ("check_cost", check_cost),
    "train-step": ("train_step", step_tables.step),
    "train-step-targets": ("train_step", step_tables.targets),
    "train-step-shares": ("train_step", step_tables.shares),
    "cifar10": ("cifar10", cifar10),
    "loader": ("loader", loader_tables.loader),
    "zoo-kernels": ("zoo", zoo_tables.kernels),
    "zoo-islands": ("zoo", zoo_tables.islands),
    "zoo-costs": ("zoo", zoo_tables.costs),
    "export-large": ("export_cost", zoo_tables.export_targets),
    "batching": ("serving", batching_tables.batching),
    "serving-load": ("serving-load", serving_tables.load),
    "comparison": ("comparison", comparison_tables.comparison),
    "swish": ("swish", design_tables.swish),
    "tracing": ("tracing", design_tables.tracing),
    "normalization": ("normalization", design_tables.normalization),
    "step-guard": ("step_guard", design_tables.step_guard),
    "method-targets": ("study-cifar10-few", method_targets),
    "term-alone": ("study-cifar10-hundredth", term_alone),
}
for _path in sorted(RESULTS.glob("study-*.json")):
    TABLES |= study_table(_path.stem)


def fill(text: str, write: Callable[[str], str]) -> str:
    """The document with write(NAME) between the markers of each table. Raises ValueError for a marker left open."""
    found = [match.group("name") for match in MARKED.finditer(text)]
    if len(found) != len(OPENING.findall(text)):
        raise ValueError("a `<!-- table:NAME -->` has no `<!-- /table -->` after it, or no NAME.")
    return MARKED.sub(lambda match: f"{match.group(1)}{write(match.group('name'))}{match.group(4)}", text)


def write_table(name: str) -> str:
    """The table of this name, from its result file. Raises ValueError for a name that no table has."""
    if name not in TABLES:
        raise ValueError(f"there is no table {name!r}; there are {', '.join(TABLES)}.")
    source, write = TABLES[name]
    return write(load(source))


def main() -> None:
    """Write the documents, or say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is stale")
    check = parser.parse_args().check
    stale = []
    for document in DOCUMENTS:
        path = ROOT / document
        text = path.read_text(encoding="utf-8")
        filled = fill(text, write_table)
        if filled != text:
            stale.append(document)
            if not check:
                path.write_text(filled, encoding="utf-8")
    if check and stale:
        sys.exit(f"{', '.join(stale)}: tables differ from benchmarks/results; run python -m benchmarks.tables.")


if __name__ == "__main__":
    main()
