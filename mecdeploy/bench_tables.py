"""What `mecdeploy bench` measured, as tables for a terminal of 80 columns."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rich.table import Table

from mecdeploy.benchmark import describe
from mecdeploy.tables import _bytes, _dense_table

if TYPE_CHECKING:
    from mecdeploy.benchmark import BenchReport, BenchRow


def timings(report: BenchReport) -> list[Table]:
    """One table for each number of threads and each batch."""
    groups = groupby(report.rows, key=lambda row: (row.threads, row.batch))
    return [_timing(report, describe(*setting), list(rows)) for setting, rows in groups]


def _timing(report: BenchReport, setting: str, rows: list[BenchRow]) -> Table:
    ratio = () if report.baseline is None else ("time",)
    table = _dense_table("model", "file", "load", "memory", "median", "quartiles", "images/s", *ratio)
    table.title, table.title_justify, table.caption_justify = setting, "left", "left"
    for row in rows:
        cells = [
            row.model,
            _bytes(row.size),
            _duration(row.load.median),
            _bytes(row.load.memory),
            _duration(row.latency.median),
            _between(row.latency.lower_quartile, row.latency.upper_quartile, row.latency.median),
            _digits(row.images_per_second),
        ]
        if report.baseline is not None:
            cells.append("1.00x" if row.ratio is None else f"{row.ratio.median:.2f}x")
        table.add_row(*cells)
    rounds = len(rows[0].latency.rounds)
    table.caption = f"{rounds} rounds" + (
        "." if report.baseline is None else f"; time: over {report.baseline}'s in the same round, median."
    )
    return table


def kernels(row: BenchRow) -> Table:
    """Where the time of one model goes, by kernel."""
    assert row.profile is not None
    table = _dense_table("kernel", "nodes", "time", "share")
    table.title, table.title_justify = f"{row.model}, {describe(row.threads, row.batch)}", "left"
    for kernel in row.profile.kernels:
        table.add_row(kernel.kernel, str(kernel.nodes), _duration(kernel.microseconds / 1e6), f"{kernel.share:.1%}")
    return table


def machine(report: BenchReport) -> str:
    """Where all of it was measured, in a line or two."""
    vnni = {True: ", VNNI", False: ", no VNNI", None: ""}[report.cpu.vnni]
    cores = f"{report.cores} core{'s' if report.cores > 1 else ''}"
    busy = "" if report.load_average is None else f", {report.load_average:g} processes wanted one before"
    return f"onnxruntime {report.versions['onnxruntime']} on {report.cpu.model}{vnni}; {cores}{busy}"


def _duration(seconds: float) -> str:
    size, unit = _unit(seconds)
    return f"{_digits(seconds / size)} {unit}"


def _between(lower: float, upper: float, median: float) -> str:
    """Quartiles, in the unit of the median."""
    size, _ = _unit(median)
    return f"{_digits(lower / size)}-{_digits(upper / size)}"


def _unit(seconds: float) -> tuple[float, str]:
    return next((unit for unit in ((1.0, "s"), (1e-3, "ms")) if seconds >= unit[0]), (1e-6, "us"))


def _digits(value: float) -> str:
    """Three significant ones, or all: 7.30, 73.0, 730, 7,300."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"
