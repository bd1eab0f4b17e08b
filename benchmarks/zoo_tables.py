"""The tables of docs/models.md, from results/zoo.json and results/export_cost.json; the standard library alone."""

from __future__ import annotations

from benchmarks.markdown import Result, measured_on, table, verdict

WIDTHS = ("w8a8", "w4a4", "w2a2")
LONGEST_EXPORT, LARGEST_EXPORT = 10.0, 3.0  # seconds, and extra memory over the fp32 weights; said before measuring


def kernels(result: Result) -> str:
    """What runs in integers, and how many of them were compared; W4A4 for structure, all widths for integers."""
    head = (
        "network",
        "image",
        "integer convolutions, products",
        "in float",
        "other integer kernels",
        "float islands",
        "integers compared",
        "different",
        "integers from islands moved by a step",
    )
    rows = []
    for name, row in done(result).items():
        w4 = row["w4a4"]
        rows.append(
            (
                name,
                str(row["side"]),
                str(w4["integer_products"]),
                str(w4["float_products"]),
                str(w4["integer_kernels"] - w4["integer_products"]),
                str(w4["islands"]),
                f"{total(row, 'integers_compared'):,}",
                f"{total(row, 'integers_different'):,}",
                moved(row),
            )
        )
    return table(head, rows, left=1) + absent(result) + measured_on(result)


def moved(row: Result) -> str:
    """Of values quantised from float islands: those on which PyTorch and onnxruntime rounded apart."""
    compared = total(row, "island_values_compared")
    if not compared:
        return ""
    steps = max(row[width]["island_steps"] for width in WIDTHS if width in row)
    share = f"{total(row, 'island_values_different'):,} of {compared:,}"
    return share if steps <= 1 else f"{share}, up to {steps:g} steps"


def islands(result: Result) -> str:
    """Family -> the operators that its networks leave in float."""
    found: dict[str, set[str]] = {}
    for row in done(result).values():
        found.setdefault(row["family"], set()).update(row["w4a4"]["island_operators"])
    rows = [(name, ", ".join(sorted(operators)) or "none") for name, operators in sorted(found.items())]
    return table(("family", "operators in float islands"), rows, left=2)


def costs(result: Result) -> str:
    """Sizes, latency of W4A4, and what its export took."""
    head = (
        "network",
        "parameters, M",
        "fp32, MB",
        "W8A8",
        "W4A4",
        "W2A2",
        "W4A4 of fp32 time",
        "of static int8 time",
        "export, s",
        "memory, of fp32 weights",
    )
    rows = []
    for name, row in done(result).items():
        sizes = (f"{row[width]['file_bytes'] / 1e6:.2f}" if width in row else "" for width in WIDTHS)
        rows.append(
            (
                name,
                f"{row['parameters'] / 1e6:.1f}",
                f"{row['fp32_bytes'] / 1e6:.2f}" if "fp32_bytes" in row else "",
                *sizes,
                median(row, "ratio_to_fp32"),
                median(row, "ratio_to_static_int8"),
                f"{row['export']['seconds']:.1f}",
                f"{row['export']['extra_over_fp32_weights']:.1f}",
            )
        )
    return table(head, rows, left=1) + unquantised(result) + measured_on(result)


def median(row: Result, key: str) -> str:
    """A ratio, or nothing where its baseline was not measured."""
    return f"{row[key]['median']:.2f}" if key in row else ""


def unquantised(result: Result) -> str:
    """Which networks onnxruntime's own static int8 fails on, and which were measured at W4A4 alone."""
    rows = done(result)
    failed = {name: row["static_int8_error"] for name, row in rows.items() if "static_int8_error" in row}
    lines = [f"\nonnxruntime's quantize_static fails on {name}: {reason}.\n" for name, reason in failed.items()]
    light = [name for name, row in rows.items() if row["light"]]
    if light:
        lines.append(f"\nIn the light pass, W4A4 alone and no baselines: {', '.join(light)}.\n")
    untrained = [name for name, row in rows.items() if row["steps"] == 0]
    if untrained:
        lines.append(f"\nWithout a training step, for its memory: {', '.join(untrained)}.\n")
    return "".join(lines)


def absent(result: Result) -> str:
    """Networks without a whole row: those that failed, with what stopped them, and those that were not run."""
    failed = {name: row["error"] for name, row in result["networks"].items() if "error" in row}
    lines = [f"\n**{name}**: {reason}\n" for name, reason in failed.items()]
    if result["not_run"]:
        lines.append(f"\nNot run: {', '.join(result['not_run'])}.\n")
    return "".join(lines)


def done(result: Result) -> dict[str, Result]:
    """The rows that are whole."""
    return {name: row for name, row in result["networks"].items() if "error" not in row}


def total(row: Result, key: str) -> int:
    """Over all widths that were measured."""
    return sum(int(row[width][key]) for width in WIDTHS if width in row)


def export_targets(result: Result) -> str:
    """The export of large networks at 224x224 beside what was asked for."""
    rows = []
    for name, cost in result["networks"].items():
        rows.append(verdict(f"{name}, seconds", cost["seconds"], LONGEST_EXPORT, 1))
        extra = cost["extra_over_fp32_weights"]
        rows.append(verdict(f"{name}, extra memory over fp32 weights", extra, LARGEST_EXPORT, 2))
    return table(("export at 224x224, W4A4", "target, at most", "measured", ""), rows, left=1) + measured_on(result)
