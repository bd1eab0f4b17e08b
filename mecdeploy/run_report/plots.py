"""Plots as SVG that stands in the page: its text and axes take the page's colours, light or dark. They need matplotlib.

Colours are placeholders while matplotlib draws, since it knows neither `currentColor` nor variables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from mecdeploy.run_report.facts import Histogram
from mecdeploy.training.events import ACCURACY

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

_INK = "#010203"
_LINES = {
    "#0a0b01": "var(--line-1)",
    "#0a0b02": "var(--line-2)",
    "#0a0b03": "var(--line-3)",
    "#0a0b04": "var(--line-4)",
}
_FIRST = next(iter(_LINES))
_FAINT = "#010204"
_COLOURS = {_INK: "currentColor", _FAINT: "var(--rule)", **_LINES}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "mecdeploy",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_TIDIED = (
    (re.compile(r"<metadata>.*?</metadata>|<style .*?</style>", re.DOTALL), ""),
    (re.compile(r' id="[a-z]+_\d+"| id="matplotlib\.\w+"'), ""),
    (re.compile(r" font-family: [^;]*;"), ""),
    (re.compile(r"\s*\n\s*"), " "),
)
_COORDINATES = re.compile(r' (?:d|x|y|transform)="[^"]*"')
_PANEL = (4.6, 2.6)  # inches
_SMALL = (2.2, 0.9)
_WITH_THE_LOSS = ("task", "distill", "damping")
_WEIGHT = "beta"
"""Terms of the loss that are no part of the objective's own plot: its other parts, and the objective's weight."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One figure. title: above it. description: for who cannot see it."""

    title: str
    description: str
    svg: str


def training_curves(history: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Accuracy, loss, and the terms of the objective where there is one, over all epochs in the order of training."""
    if not history:
        return []
    measures = {history[-1].get(key, ACCURACY) for key in ("train_measure", "validation_measure")}
    shares = {
        "training": [100 * epoch["train_accuracy"] for epoch in history],
        "validation": [100 * epoch["validation_accuracy"] for epoch in history],
    }
    losses = {"loss": [epoch["loss"] for epoch in history]}
    losses |= {name: _term(history, name) for name in _WITH_THE_LOSS if _occurs(history, name)}
    if losses.get("task") == losses["loss"]:
        del losses["task"]
    plots = [
        _curves("Accuracy" if measures == {ACCURACY} else "Right answers", "%", shares, history),
        _curves("Loss", "nats", losses, history),
    ]
    names = dict.fromkeys(
        name for epoch in history for name in epoch["terms"] if name not in (*_WITH_THE_LOSS, _WEIGHT)
    )
    if names:
        terms = {name: _term(history, name) for name in names}
        plots.append(_curves("Terms of the coding objective", "nats", terms, history))
    return plots


def histograms(found: Sequence[Histogram]) -> list[str]:
    """Bars over the codes, each as wide as its code's own part of the axis, which says its first and last code, and 0.

    As high as the square root of the count: zero is so frequent behind a ReLU that nothing else would be seen. All are
    drawn on one figure after the other: making one takes longer than drawing on it.
    """
    from matplotlib.figure import Figure

    drawn = []
    with _style():
        figure = Figure(figsize=_SMALL)
        axes = figure.add_axes((0.02, 0.24, 0.96, 0.74))
        axes.set_axis_off()
        axes.axhline(0, color=_INK, linewidth=1)
        for one in found:
            codes, heights = one.codes, [count**0.5 for count in one.counts]
            between = [(left + right) / 2 for left, right in zip(codes, codes[1:], strict=False)]
            first, last = (between[0], between[-1]) if between else (codes[0] + 0.5, codes[0] - 0.5)
            edges = [2 * codes[0] - first, *between, 2 * codes[-1] - last]
            axes.set_xlim(edges[0], edges[-1])
            axes.set_ylim(0, max(heights) or 1)
            shown = sorted({codes[0], codes[-1], *({0} if codes[0] < 0 < codes[-1] else ())})
            artists: list[Artist] = [axes.stairs(heights, edges, fill=True, color=_FIRST, linewidth=0)]
            for code in shown:
                place = {codes[0]: "left", codes[-1]: "right"}.get(code, "center")
                at = {"left": edges[0], "right": edges[-1], "center": code}[place]
                below = axes.get_xaxis_transform()
                artists.append(axes.text(at, -0.08, str(code), ha=place, va="top", fontsize=8, transform=below))
            drawn.append(_svg(figure))
            for artist in artists:
                artist.remove()
    return drawn


def _curves(title: str, unit: str, lines: Mapping[str, Sequence[float]], history: Sequence[Mapping[str, Any]]) -> Plot:
    """Lines over epochs, broken where a stage ends, with a rule and its name where one begins."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    starts = [
        index for index, epoch in enumerate(history) if index == 0 or epoch["stage"] != history[index - 1]["stage"]
    ]
    with _style():
        figure = Figure(figsize=_PANEL, layout="constrained")
        axes = figure.subplots()
        for (name, values), color in zip(lines.items(), cycle(_LINES), strict=False):
            for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(history)], strict=True)):
                axes.plot(
                    range(start + 1, end + 1),
                    values[start:end],
                    color=color,
                    linewidth=1.5,
                    marker="o",
                    markersize=2.5,
                    label=name if number == 0 else None,
                )
        for start in starts:
            if start:
                axes.axvline(start + 0.5, color=_FAINT, linewidth=1)
            stage = history[start]["stage"]
            axes.text(start + 0.7, 1.0, stage, transform=axes.get_xaxis_transform(), fontsize=8, va="bottom")
        axes.set_xlim(0.5, len(history) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")
        axes.set_ylabel(unit)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
        svg = _svg(figure)
    ends = ", ".join(f"{name} ends at {values[-1]:.4g} {unit}" for name, values in lines.items())
    return Plot(title=title, description=f"{title} over {len(history)} epochs: {ends}.", svg=svg)


def _term(history: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [epoch["terms"].get(name, float("nan")) for epoch in history]


def _occurs(history: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(name in epoch["terms"] for epoch in history)


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def _svg(figure: Figure) -> str:
    """Only the element itself, scaled to the room that it gets, in the page's colours and its font.

    Coordinates keep a tenth of a point. Names of groups are left out: each figure has the same ones.
    """
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg)
    for pattern, replacement in _TIDIED:
        svg = pattern.sub(replacement, svg)
    svg = _COORDINATES.sub(lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0]), svg)
    for placeholder, colour in _COLOURS.items():
        svg = svg.replace(placeholder, colour)
    return svg.strip()
