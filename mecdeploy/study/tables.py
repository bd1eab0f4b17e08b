"""A study's result as a table, for a terminal and as markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from mecdeploy.study.plan import Cell
from mecdeploy.study.report import StudyReport
from mecdeploy.study.statistics import LEVEL, Difference, Spread


def results(report: StudyReport) -> Table:
    """One row for each method and width."""
    head, *lines = _cells(report)
    return _rich(head, lines)


def markdown(report: StudyReport) -> str:
    """The same as a markdown table with its explanation."""
    table = _markdown(_cells(report), _words(report))
    done = f"{len(report.records)} of {report.runs} runs are finished."
    return f"{table}\n\n{done} {explanation(report)}\n"


TITLES = {
    "activation_entropy": "entropy of activations, bits",
    "weight_entropy": "entropy of weights, bits",
    "feature_effective_rank": "effective rank",
    "feature_coding_rate": "coding rate, nats",
    "feature_spread_ratio": "within / between classes",
    "hessian_eigenvalue": "top eigenvalue",
    "hessian_normalized_eigenvalue": "top eigenvalue, filters of norm 1",
    "hessian_normalized_trace": "trace, filters of norm 1",
}
"""Measures of docs/measures.md that a table shows; summary.json has the others, too."""


def measures(report: StudyReport) -> Table:
    """What study.measures asked for: means and deviations over seeds."""
    head, *lines = _measured(report, differences=False)
    return _rich(head, lines, words=_words(report))


def measures_markdown(report: StudyReport) -> str:
    """The same as a markdown table and, where there is a baseline, a second one with paired differences to it."""
    tables = [_markdown(_measured(report, differences=False), _words(report))]
    if report.baseline:
        tables += [f"Against {report.baseline}, with the {LEVEL:.0%} confidence interval of Student's t:"]
        tables += [_markdown(_measured(report, differences=True), _words(report))]
    return "\n\n".join(tables) + "\n"


def explanation(report: StudyReport) -> str:
    """What the columns are."""
    text = "Accuracy in percent: mean ± standard deviation over seeds, of the deployed arithmetic."
    if report.baseline:
        images = "test" if _tested(report) else "validation"
        text += (
            f" Difference to {report.baseline} on {images} images, in points: mean over seeds that both have, with the "
            f"{LEVEL:.0%} confidence interval of Student's t; one seed has none."
        )
    return text


def planned(cells: Sequence[Cell], images: Sequence[int | None]) -> Table:
    """What a study is going to run. images: training images of each run, None where they are not known yet."""
    head = ["run", "starts from", "epochs", "images an epoch"]
    counts = ["?" if count is None else f"{count:,}" for count in images]
    lines = [
        [cell.name, cell.start or cell.config.weights or "random", f"{cell.epochs}", count]
        for cell, count in zip(cells, counts, strict=True)
    ]
    return _rich(head, lines, words=2)


def _rich(head: Sequence[str], lines: Sequence[Sequence[str]], words: int = 3) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for index, name in enumerate(head):
        table.add_column(name, justify="left" if index < words else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def _cells(report: StudyReport) -> list[list[str]]:
    """Head and rows; columns that would be empty are left out."""
    tested, regimes = _tested(report), _words(report) == 3
    head = ["method", "bits", "runs", "validation, %"]
    lines = [[row.method, row.bits, f"{row.validation.n}", _spread(row.validation)] for row in report.rows]
    if tested:
        head.append("test, %")
        for line, row in zip(lines, report.rows, strict=True):
            line.append(_spread(row.test))
    if report.baseline:
        head.append(f"against {report.baseline}, points")
        for line, row in zip(lines, report.rows, strict=True):
            line.append(_difference(row.test_difference if tested else row.difference))
    if regimes:
        head.insert(0, "regime")
        for line, row in zip(lines, report.rows, strict=True):
            line.insert(0, row.regime)
    return [head, *lines]


def _measured(report: StudyReport, *, differences: bool) -> list[list[str]]:
    """Head and rows; the baseline has no differences, and no row of them."""
    known = [key for key in TITLES if any(key in row.values for row in report.measured)]
    regimes = _words(report) == 3
    lines = []
    for row in report.measured:
        if differences and not row.differences:
            continue
        found = row.differences if differences else row.values
        cells = [_significant(found[key]) if key in found else "" for key in known]
        lines.append([*([row.regime] if regimes else []), row.method, row.bits, *cells])
    return [[*(["regime"] if regimes else []), "method", "bits", *(TITLES[key] for key in known)], *lines]


def _significant(found: Spread) -> str:
    """To three digits, whatever the unit."""
    if isinstance(found, Difference):
        if found.interval is None:
            return f"{found.mean:+.3g}"
        low, high = found.interval
        return f"{found.mean:+.3g} [{low:+.3g}, {high:+.3g}]"
    return f"{found.mean:.3g}" if found.deviation is None else f"{found.mean:.3g} ± {found.deviation:.2g}"


def _markdown(rows: Sequence[Sequence[str]], words: int) -> str:
    head, *lines = rows
    rule = ["---" if index < words else "---:" for index in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def _words(report: StudyReport) -> int:
    """Columns of words: regime (where there are any), method, bits."""
    return 3 if any(row.regime for row in report.rows) else 2


def _tested(report: StudyReport) -> bool:
    return any(row.test is not None for row in report.rows)


def _spread(found: Spread | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:.2f}" if found.deviation is None else f"{found.mean:.2f} ± {found.deviation:.2f}"


def _difference(found: Difference | None) -> str:
    if found is None:
        return ""
    if found.interval is None:
        return f"{found.mean:+.2f}"
    low, high = found.interval
    return f"{found.mean:+.2f} [{low:+.2f}, {high:+.2f}]"
