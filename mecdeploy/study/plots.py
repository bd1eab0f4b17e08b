"""Accuracy by bits and training curves, as SVG, the same bytes for the same study. They need the extra `plots`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mecdeploy.run_folder import write_atomically
from mecdeploy.study.config import START
from mecdeploy.study.report import Row
from mecdeploy.study.results import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCURACY, CURVES = "accuracy.svg", "curves.svg"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "mecdeploy",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
}
_PANEL = (3.6, 2.8)  # inches


def write(out: Path, rows: Sequence[Row], records: Sequence[Record]) -> list[str]:
    """Write accuracy.svg and curves.svg; returns a sentence where they cannot be drawn."""
    try:
        import matplotlib
    except ImportError:
        return ["No plots, since matplotlib is missing: pip install 'mecdeploy[plots]'."]
    methods = [name for name in dict.fromkeys(record["method"] for record in records) if name != START]
    with matplotlib.rc_context(_STYLE):
        for name, figure in ((ACCURACY, accuracy(rows, methods)), (CURVES, curves(records, methods))):
            if figure is not None:
                content = io.BytesIO()
                figure.savefig(content, format="svg", metadata={"Date": None})
                write_atomically(out / name, content.getvalue())
    return []


def accuracy(rows: Sequence[Row], methods: Sequence[str]) -> Figure | None:
    """One panel per regime: mean and standard deviation of each method at each width, full precision as a line.

    Of the test images where they were read, else of the validation images. methods: in the order of their colours.
    """
    regimes = list(dict.fromkeys(row.regime for row in rows if row.method != START))
    bits = list(dict.fromkeys(row.bits for row in rows if row.bits))
    if not regimes:
        return None
    figure, panels = _panels(1, len(regimes))
    tested = any(row.test is not None for row in rows)
    for panel, regime in zip(panels[0], regimes, strict=True):
        for index, method in enumerate(methods):
            found = {row.bits: row for row in rows if (row.regime, row.method) == (regime, method)}
            shown = {key: (row.test if tested else row.validation) for key, row in found.items()}
            spreads = {key: spread for key, spread in shown.items() if spread is not None}
            color = f"C{index}"
            if "" in spreads:
                panel.axhline(spreads[""].mean, color=color, linestyle="--", linewidth=1, label=method)
                continue
            shift = (index - (len(methods) - 1) / 2) * 0.1  # side by side, so that error bars can be told apart
            panel.errorbar(
                [bits.index(key) + shift for key in spreads],
                [spread.mean for spread in spreads.values()],
                yerr=[spread.deviation or 0.0 for spread in spreads.values()],
                color=color,
                marker="o",
                markersize=4,
                capsize=3,
                linewidth=1,
                label=method,
            )
        panel.set_xticks(range(len(bits)), bits)
        panel.set_title(regime)
        panel.set_ylabel(f"{'test' if tested else 'validation'} accuracy, %")
        panel.legend(frameon=False)
    return figure


def curves(records: Sequence[Record], methods: Sequence[str]) -> Figure | None:
    """Validation accuracy by epoch, mean over seeds with their range: one panel for each regime (down) and width.

    methods: in the order of their colours.
    """
    from matplotlib.ticker import MaxNLocator

    shown = [record for record in records if record["method"] != START]
    regimes = list(dict.fromkeys(record["regime"] for record in shown))
    bits = list(dict.fromkeys(record["bits"] for record in shown if record["bits"])) or [""]
    if not regimes:
        return None
    figure, panels = _panels(len(regimes), len(bits))
    for line, regime in zip(panels, regimes, strict=True):
        for panel, width in zip(line, bits, strict=True):
            for index, method in enumerate(methods):
                runs = [
                    [100 * epoch["validation_accuracy"] for epoch in record["history"]]
                    for record in shown
                    if (record["regime"], record["method"]) == (regime, method) and record["bits"] in (width, "")
                ]
                _curve(panel, runs, label=method, color=f"C{index}")
            panel.set_title(" ".join(part for part in (regime, width) if part))
            panel.set_xlabel("epoch")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.set_ylabel("validation accuracy, %")
            panel.legend(frameon=False)
    return figure


def _curve(panel: Axes, runs: Sequence[Sequence[float]], *, label: str, color: str) -> None:
    """Mean over the runs, epoch by epoch, in front of their range."""
    by_epoch = list(zip(*runs, strict=False))
    if by_epoch:
        epochs = range(1, len(by_epoch) + 1)
        panel.plot(epochs, [sum(one) / len(one) for one in by_epoch], color=color, linewidth=1, label=label)
        panel.fill_between(epochs, list(map(min, by_epoch)), list(map(max, by_epoch)), color=color, alpha=0.2, lw=0)


def _panels(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained")
    return figure, [list(line) for line in figure.subplots(rows, columns, squeeze=False)]
