"""The layers of a file drawn from top to bottom: one column of boxes, and beside it the ways around.

However deep a network is, its drawing stays as wide as a telephone, and grows in length alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mecdeploy.run_report.facts import Layer
from mecdeploy.runtime_checks.model_file import LOGITS, PIXELS

WIDTH, HEIGHT, GAP = 236, 38, 14
"""Of a box, and between two, in pixels."""
MARGIN = 4
_LANE, _LANES_WIDE = 11, 90
"""Pixels between two lanes, and for all of them before they move closer together."""
_NAME, _KERNEL = 32, 34
"""Characters that fit into a box, on its two lines."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """One layer at (x, y). name, kernel: what fits. about: everything, for who points at it. kind: its colour."""

    x: float
    y: float
    name: str
    kernel: str
    bits: str
    about: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Edge:
    """A line that ends in an arrow. path: as SVG writes it. about: from where to where."""

    path: str
    about: str


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """All of it, in pixels."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]


def draw(layers: Sequence[Layer], input_shape: tuple[int, int, int]) -> Drawing:
    """The layers in their order, between the pixels and the logits."""
    place = {PIXELS: 0, **{layer.name: index for index, layer in enumerate(layers, 1)}}
    ways = [(place[source], place[layer.name], source, layer.name) for layer in layers for source in layer.reads]
    ways.append((len(layers), len(layers) + 1, layers[-1].name if layers else PIXELS, LOGITS))
    lanes = _lanes([(start, end) for start, end, *_ in ways if end > start + 1])
    count = max(lanes.values(), default=-1) + 1
    spacing = min(_LANE, _LANES_WIDE / count) if count else 0.0
    shape = "x".join(map(str, input_shape))
    ends = [_end(0, PIXELS, f"uint8, {shape}"), _end(len(layers) + 1, LOGITS, "float32")]
    return Drawing(
        width=MARGIN + WIDTH + (count + 1) * spacing + MARGIN,
        height=2 * MARGIN + (len(layers) + 2) * (HEIGHT + GAP) - GAP,
        boxes=(ends[0], *(_box(index, layer) for index, layer in enumerate(layers, 1)), ends[1]),
        edges=tuple(
            Edge(
                path=_path(start, end, spacing * (lanes[start, end] + 1) if end > start + 1 else 0.0),
                about=f"{source} to {target}",
            )
            for start, end, source, target in ways
        ),
    )


def bits_of(layer: Layer) -> str:
    """W4 to A4: the width of its weights, and of what it writes; the narrowest first where it writes several."""
    written = sorted({value.bits for value in layer.values})
    weights = f"W{layer.weights.bits} " if layer.weights is not None else ""
    return weights + "/".join(f"A{bits}" for bits in written) if written else weights.strip()


def _lanes(ways: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """A lane for each way, the shortest ways nearest to the boxes: no two that share a lane meet between their ends."""
    taken: list[list[tuple[int, int]]] = []
    lanes = {}
    for start, end in sorted(set(ways), key=lambda way: (way[1] - way[0], way)):
        free = (lane for lane, others in enumerate(taken) if all(end <= s or start >= e for s, e in others))
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((start, end))
        lanes[start, end] = lane
    return lanes


def _top(index: int) -> float:
    return MARGIN + index * (HEIGHT + GAP)


def _path(start: int, end: int, out: float) -> str:
    """Straight down to the next box; else out of the right side, along a lane, and back in."""
    if not out:
        middle = MARGIN + WIDTH / 2
        return f"M{middle:g} {_top(start) + HEIGHT:g}V{_top(end):g}"
    side, lane = MARGIN + WIDTH, MARGIN + WIDTH + out
    leaves, enters = _top(start) + HEIGHT * 0.7, _top(end) + HEIGHT * 0.3
    bend = min(out, 6.0)
    return (
        f"M{side:g} {leaves:g}H{lane - bend:g}Q{lane:g} {leaves:g} {lane:g} {leaves + bend:g}"
        f"V{enters - bend:g}Q{lane:g} {enters:g} {lane - bend:g} {enters:g}H{side:g}"
    )


def _box(index: int, layer: Layer) -> Box:
    bits = bits_of(layer)
    kind = "float" if layer.island else f"w{layer.weights.bits}" if layer.weights is not None else "plain"
    lines = [layer.name, layer.kernel, bits, f"reads {', '.join(layer.reads)}", layer.reason]
    return Box(
        x=MARGIN,
        y=_top(index),
        name=_last(layer.name, _NAME - len(bits)),
        kernel=_first(f"float: {layer.kernel}" if layer.island else layer.kernel, _KERNEL),
        bits=bits,
        about="\n".join(filter(None, lines)),
        kind=kind,
    )


def _end(index: int, name: str, kernel: str) -> Box:
    return Box(x=MARGIN, y=_top(index), name=name, kernel=kernel, bits="", about=f"{name}\n{kernel}", kind="end")


def _last(text: str, most: int) -> str:
    """Of a dotted name the end says more than the beginning."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _first(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
