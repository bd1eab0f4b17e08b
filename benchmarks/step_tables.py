"""Tables of what a training step costs."""

from __future__ import annotations

from benchmarks.markdown import Result, measured_on, table, verdict

SLOWEST_STEP, LARGEST_PEAK = 1.25, 1.3  # of full precision; asked for before anything was measured

VARIANTS = {"fp32": "full precision", "lsq": "QAT, LSQ", "mec": "QAT, MEC-Quant", "deploy": "final phase, MEC-Quant"}


def step(result: Result) -> str:
    """Time and memory of each variant, and the targets."""
    compiled = any("of_fp32_compiled" in row for row in result["variants"].values())
    head = ["step", "median, ms", "of full precision", "quartiles", "images/s", "peak memory, MB", "of full precision"]
    if compiled:
        head.insert(4, "of full precision, compiled")
    rows = []
    for name, row in result["variants"].items():
        ratio, peak = row["of_fp32"], row["peak_megabytes"]
        cells = [
            _words(name),
            f"{row['milliseconds']['median']:.0f}",
            f"{ratio['median']:.2f}",
            f"{ratio['q1']:.2f} to {ratio['q3']:.2f}",
            f"{row['images_per_second']:.0f}",
            f"{peak:.0f}",
            f"{row['peak_of_fp32']:.2f}",
        ]
        if compiled:
            cells.insert(4, f"{row['of_fp32_compiled']['median']:.2f}")
        rows.append(tuple(cells))
    network = result["network"]
    what = (
        f"\n{network['model']}, {network['side']}x{network['side']} pixels, batch {network['batch']}, "
        f"W{network['bits']}A{network['bits']}, {network['rounds']} rounds.\n"
    )
    return table(tuple(head), rows, left=1) + what + measured_on(result)


def targets(result: Result) -> str:
    """Each target beside what was measured."""
    variants = result["variants"]
    mec, compiled = variants["mec"], variants.get("mec compiled")
    rows = [
        verdict("step of QAT with MEC, of full precision", mec["of_fp32"]["median"], SLOWEST_STEP, 2),
        verdict("peak memory of QAT with MEC, of full precision", mec["peak_of_fp32"], LARGEST_PEAK, 2),
    ]
    if compiled is not None:
        ratio = compiled["of_fp32_compiled"]["median"]
        rows.append(verdict("step of QAT with MEC, of full precision, both compiled", ratio, SLOWEST_STEP, 2))
    network = result["network"]
    head = f"{network['model']}, batch {network['batch']}, W{network['bits']}A{network['bits']}"
    return table((head, "target, at most", "measured", ""), rows, left=1)


def shares(result: Result) -> str:
    """Where the time of a step goes."""
    found = {name: share["median"] for name, share in result["shares_of_a_mec_step"].items()}
    rest = 1 - sum(found.values())
    rows = [(name, f"{100 * share:.1f}") for name, share in found.items()]
    rows.append(("pooling, loss, Python", f"{100 * rest:.1f}"))
    return table(("part of a step of QAT with MEC", "share, %"), rows, left=1)


def _words(variant: str) -> str:
    method, _, compiled = variant.partition(" ")
    return f"{VARIANTS[method]}, {compiled}" if compiled else VARIANTS[method]
