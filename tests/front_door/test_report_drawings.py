"""The drawings of a report: what a plot's path says of its numbers, and lines that do not run into each other."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mecdeploy.run_report.answering import confusion, png
from mecdeploy.run_report.facts import Histogram, Layer
from mecdeploy.run_report.graph_drawing import GAP, HEIGHT, MARGIN, WIDTH, draw
from mecdeploy.run_report.page import _confusion, duration
from mecdeploy.run_report.plots import histograms, training_curves


def of_codes(codes: Sequence[int], counts: Sequence[int]) -> Histogram:
    return Histogram(
        bits=8, codes=tuple(codes), counts=tuple(counts), entropy=0.0, levels=0, lowest=0.0, highest=0.0
    )  # the drawing reads codes and counts alone


def bars(svg: str) -> list[tuple[float, float, float]]:
    """(left, right, height) of every bar of a histogram's path, in points."""
    path = next(found for found in re.findall(r'<path d="([^"]*)"', svg) if found.count("L") > 5)
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]
    floor = max(y for _, y in points)
    steps = zip(points, points[1:], strict=False)
    return [(x, right, floor - y) for (x, y), (right, other) in steps if y == other and right > x]


def test_a_bar_is_as_high_as_the_square_root_of_its_count() -> None:
    (svg,) = histograms([of_codes(range(-2, 2), [4, 100, 25, 1])])
    found = bars(svg)
    assert len(found) == 4
    tallest = max(height for *_, height in found)
    for (*_, height), expected in zip(found, (0.2, 1.0, 0.5, 0.1), strict=True):
        assert height / tallest == pytest.approx(expected, abs=0.01)  # coordinates have a tenth of a point, of some 50
    assert re.findall(r"<text[^>]*>([^<]*)</text>", svg) == ["-2", "0", "1"]


def test_bars_of_uneven_levels_reach_halfway_to_their_neighbours() -> None:
    (svg,) = histograms([of_codes([-8, 0, 2], [1, 9, 4])])
    found = bars(svg)
    unit = (found[-1][1] - found[0][0]) / (3 - -12)  # points a code: from -8 - 4 to 2 + 1
    edges = [found[0][0], *(right for _, right, _ in found)]
    assert [(edge - edges[0]) / unit - 12 for edge in edges] == pytest.approx([-12, -4, 1, 3], abs=0.02)  # 0.1 points
    assert re.findall(r"<text[^>]*>([^<]*)</text>", svg) == ["-8", "0", "2"]


def test_histograms_of_one_figure_do_not_see_each_other() -> None:
    one, other = of_codes([0, 1], [3, 5]), of_codes(range(16), range(16))
    assert histograms([one, other, one]) == [*histograms([one, other]), *histograms([one])]
    assert histograms([of_codes([0], [7]), of_codes([0, 1], [0, 0])])  # one code; nothing counted


def epoch(stage: str, loss: float, **terms: float) -> dict[str, object]:
    return {
        "stage": stage,
        "loss": loss,
        "terms": terms,
        "train_accuracy": 0.5,
        "validation_accuracy": 0.25,
        "train_measure": "accuracy",
        "validation_measure": "accuracy",
    }


def test_curves_say_where_they_end_and_keep_the_digits_of_their_axes() -> None:
    losses = (1.380, 1.375, 1.371, 1.366)
    plots = training_curves([epoch("fp32", loss, task=loss) for loss in losses])
    assert [plot.title for plot in plots] == ["Accuracy", "Loss"]
    assert "training ends at 50 %, validation ends at 25 %" in plots[0].description
    labels = re.findall(r"<text[^>]*>(1\.\d+)</text>", plots[1].svg)
    assert len(labels) > 2 and len(set(labels)) == len(labels), "labels of an axis are all different"
    plots = training_curves([epoch("fp32", 1.0, task=1.0), epoch("qat", 0.5, task=0.75, mec=0.25, features=1.0)])
    assert plots[2].title == "Terms of the coding objective" and "mec ends at 0.25" in plots[2].description
    for plot in plots:
        assert "fp32" in plot.svg and "qat" in plot.svg and plot.svg.startswith("<svg viewBox=")
        assert not re.search(r'id="(figure|axes|patch)_', plot.svg) and "<style" not in plot.svg
    assert training_curves([]) == []


@given(st.lists(st.sets(st.integers(0, 39), max_size=3), min_size=1, max_size=40))
@settings(deadline=None, max_examples=60)
def test_lines_beside_the_boxes_never_share_a_piece_of_a_lane(sources: list[set[int]]) -> None:
    """layer i reads the pixels, its predecessor, or any layers before it."""
    layers = []
    for index, chosen in enumerate(sources):
        reads = tuple(f"layer{place}" for place in sorted(chosen) if place < index) or ("pixels",)
        layers.append(Layer(name=f"layer{index}", kernel="Conv", reads=reads))
    drawing = draw(layers, (3, 8, 8))
    assert drawing.width <= 2 * MARGIN + WIDTH + 90 * 2  # a telephone is 390 wide
    assert len(drawing.edges) == sum(len(layer.reads) for layer in layers) + 1
    pieces = []
    for edge in drawing.edges:
        corners = re.fullmatch(r"M(\S+) (\S+)H\S+?Q(\S+) \S+ \S+ \S+?V\S+?Q\S+ (\S+) \S+ \S+?H\S+", edge.path)
        if corners is None:  # straight down, between two boxes
            top, bottom = map(float, re.findall(r"[ V](\S+?)(?=V|$)", edge.path))
            assert bottom - top == GAP
            continue
        start, lane, end = float(corners[2]), float(corners[3]), float(corners[4])
        assert lane > MARGIN + WIDTH and end - start > HEIGHT
        pieces.append((lane, start, end))
    order = {"pixels": 0, **{layer.name: index for index, layer in enumerate(layers, 1)}}
    assert len(pieces) == sum(order[layer.name] - order[read] > 1 for layer in layers for read in layer.reads)
    for number, (lane, start, end) in enumerate(pieces):
        for other, begin, stop in pieces[:number]:
            same_source = start == begin
            assert lane != other or end <= begin or start >= stop or same_source and end == stop


def test_many_classes_are_lists_and_few_are_a_matrix() -> None:
    import numpy as np

    labels, guesses = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 0, 2])
    found = confusion(labels, guesses, 3)
    assert found.images == (2, 1, 3)
    shown = _confusion(found)
    assert shown["matrix"] == [[1, 1, 0], [0, 1, 0], [2, 0, 1]] and shown["mistakes"] == 3
    assert shown["worst_pairs"][0] == (2, 0, 2)
    assert [label for label, *_ in shown["worst_classes"]] == [2, 0, 1]
    assert _confusion(confusion(labels, guesses, 21))["matrix"] is None
    assert len(_confusion(confusion(labels, guesses, 21))["worst_classes"]) == 3  # the others have no images


def test_a_large_picture_is_shown_smaller() -> None:
    import base64
    import io

    import numpy as np
    from PIL import Image

    for channels, mode in ((1, "L"), (3, "RGB"), (4, "L")):
        image = np.zeros((channels, 300, 600), np.uint8)
        shown = Image.open(io.BytesIO(base64.b64decode(png(image))))
        assert (shown.size, shown.mode) == ((160, 80), mode)


@pytest.mark.parametrize(
    ("seconds", "said"), [(3.0365e-5, "30.4 µs"), (0.0946, "94.6 ms"), (1.5, "1.5 s"), (4e-7, "0.4 µs")]
)
def test_times_have_a_unit_that_fits(seconds: float, said: str) -> None:
    assert duration(seconds) == said
