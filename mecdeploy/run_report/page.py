"""The page: a pure function of the facts. Jinja escapes every name; only our own SVG and CSS pass as they are."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from importlib.resources import files
from typing import Any

from mecdeploy.run_report import plots
from mecdeploy.run_report.facts import Confusion, Histogram, ReportFacts
from mecdeploy.run_report.graph_drawing import HEIGHT, WIDTH, draw
from mecdeploy.tables import _bytes, _percent

MOST_IN_MATRIX = 20
"""Classes; with more, a matrix is a picture of its diagonal, and lists say what is wrong."""
LISTED = 20
FEW_PIXELS = 64
"""Of the longer side: such an image is shown larger than it is, pixel by pixel."""

SECTIONS = {
    "summary": "Summary",
    "training": "Training",
    "layers": "Layers",
    "histograms": "Histograms",
    "graph": "Graph",
    "confusion": "Confusion",
    "images": "Images",
    "reproduce": "Reproduce",
}


def render(facts: ReportFacts) -> str:
    """One HTML document."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters: dict[str, Callable[..., str]] = {
        "percent": _percent,
        "size": _bytes,
        "number": lambda count: f"{count:,}",
        "short": lambda value: f"{value + 0.0:.3g}",  # never -0
        "duration": duration,
        "moment": moment,
    }
    environment.filters |= filters
    folder = files(__package__)
    template = environment.from_string((folder / "page.html.jinja").read_text(encoding="utf-8"))
    page: str = template.render(
        f=facts,
        c=facts.certificate,
        css=Markup((folder / "page.css").read_text(encoding="utf-8")),
        sections=SECTIONS.items(),
        certificate=_certificate(facts),
        environment=_environment(facts),
        commands=commands(facts),
        plots=plots.training_curves(facts.history),
        drawing=draw(facts.layers, facts.input_shape),
        box_width=WIDTH,
        box_height=HEIGHT,
        few_pixels=max(facts.input_shape[1:]) <= FEW_PIXELS,
        **_layers(facts),
        **_confusion(facts.answers.confusion),
    )
    return page.lstrip()


def commands(facts: ReportFacts) -> str:
    """What makes this run and its file again, from its run.toml."""
    run = shlex.quote(facts.run)
    weights = [layer.weights for layer in facts.layers if layer.weights is not None]
    wider = {one.bits for one in weights if one.bits != one.trained_bits}
    options = [f"--bits {wider.pop()}"] if len(wider) == 1 else []
    options += [f"--target {facts.target}"] if facts.target != "onnxruntime" else []
    options += ["--input float"] if facts.input_dtype != "uint8" else []
    lines = [
        f"mecdeploy train --config run.toml --out {run}",
        " ".join([f"mecdeploy export {run}", *options]),
        f"mecdeploy check {run}",
        f"mecdeploy report {run}",
    ]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """30 µs, 4.2 ms or 1.3 s."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.2g} µs"


def moment(date: str) -> str:
    """2026-11-24 21:05 UTC, of a date as ISO 8601 has it."""
    return f"{datetime.fromisoformat(date):%Y-%m-%d %H:%M} UTC"


def _certificate(facts: ReportFacts) -> list[tuple[str, str]]:
    """What was compared, where and when, line by line."""
    found = facts.certificate
    lines = [
        ("checked", moment(found.date)),
        ("result", "passed" if found.passed else "FAILED"),
        ("integers", f"{found.integers_compared:,} compared, {found.integers_different:,} different"),
        ("images", f"{found.exact_images:,} integer by integer, {found.images:,} by their logits"),
        ("processor", f"{found.processor} ({found.architecture})"),
        ("versions", _versions(found.versions)),
        ("file", f"{facts.model}, SHA-256 {found.model_sha256}"),
        ("checkpoint", f"SHA-256 {found.checkpoint_sha256}"),
        ("validation images", f"SHA-256 {found.images_sha256}"),
    ]
    if found.first_different_unit is not None:
        lines.insert(3, ("first unit that differs", found.first_different_unit))
    return lines + ([("processor's note", found.processor_note)] if found.processor_note else [])


def _environment(facts: ReportFacts) -> list[tuple[str, str]]:
    channels, height, width = facts.input_shape
    return [
        ("seed", str(facts.seed)),
        ("classes", f"{len(facts.classes):,}"),
        ("input", f"{facts.input_dtype}, {channels} channel{'s' if channels > 1 else ''}, {height}x{width}"),
        ("target", facts.target),
        ("processor", facts.processor),
        ("versions", _versions(facts.versions)),
    ]


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _layers(facts: ReportFacts) -> dict[str, Any]:
    """What the sections on layers say of all of them together."""
    weighted = [layer for layer in facts.layers if layer.weights is not None]
    shares = [layer.time for layer in facts.layers if layer.time is not None]
    narrow = {layer.weights.trained_bits for layer in weighted if layer.weights is not None}
    terms = dict.fromkeys(name for epoch in facts.history for name in epoch["terms"])
    return {
        "labelled": facts.answers.confusion is not None,
        "islands": [layer for layer in facts.layers if layer.island],
        "weight_histograms": _drawn((layer.name, layer.weights.histogram) for layer in weighted if layer.weights),
        "activation_histograms": _drawn(
            (value.name, value.histogram) for layer in facts.layers for value in layer.values
        ),
        "timed": bool(shares),
        "untimed": sum(shares) < 0.995,
        "weight_bytes": sum(layer.weights.bytes for layer in weighted if layer.weights is not None),
        "weight_widths": sorted({layer.weights.bits for layer in weighted if layer.weights is not None}),
        "widths": f"{' and '.join(map(str, sorted(narrow)))}-bit weights",
        "terms": list(terms),
    }


def _drawn(named: Iterable[tuple[str, Histogram | None]]) -> list[tuple[str, Histogram, str]]:
    """Name, histogram and its SVG."""
    shown = [(name, histogram) for name, histogram in named if histogram is not None]
    drawn = plots.histograms([histogram for _, histogram in shown])
    return [(name, histogram, svg) for (name, histogram), svg in zip(shown, drawn, strict=True)]


def _confusion(found: Confusion | None) -> dict[str, Any]:
    """A matrix of few classes, lists of many."""
    if found is None:
        return {"matrix": None, "mistakes": 0, "worst_pairs": [], "worst_classes": []}
    classes = len(found.images)
    wrong = [pair for pair in found.counts if pair[0] != pair[1]]
    right = {label: count for label, guess, count in found.counts if label == guess}
    matrix = None
    if classes <= MOST_IN_MATRIX:
        matrix = [[0] * classes for _ in range(classes)]
        for label, guess, count in found.counts:
            matrix[label][guess] = count
    shares = [(label, right.get(label, 0), images) for label, images in enumerate(found.images) if images]
    return {
        "matrix": matrix,
        "mistakes": sum(count for *_, count in wrong),
        "worst_pairs": wrong[:LISTED],
        "worst_classes": sorted(shares, key=lambda row: row[1] / row[2])[:LISTED],
    }
