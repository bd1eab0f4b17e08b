"""The page of a report in a real browser: whole, quiet, alone, and no wider than the window."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from visiting import Open

from mecdeploy.run_report.facts import Answer, Answers, Confusion, Layer, Picture, ReportFacts
from mecdeploy.run_report.page import SECTIONS, render
from mecdeploy.run_report.writing import report

WINDOWS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> ReportFacts:
    """Of a real run, on one channel; the other pages are this one with something changed."""
    from mecdeploy import DataConfig, ScheduleConfig, TrainConfig, export, train

    out = tmp_path_factory.mktemp("runs") / "digits"
    schedule = ScheduleConfig(fp_epochs=2, epochs=2, frozen_epochs=1)
    train(TrainConfig(device="cpu", data=DataConfig(fraction=0.2), schedule=schedule), out)
    export(out)
    found = report(out).facts
    shutil.rmtree(out)  # the page needs nothing of it
    return found


def with_classes(facts: ReportFacts, names: tuple[str, ...]) -> ReportFacts:
    """Every second image of a class is taken for the next class, and shown among the mistakes."""
    count = len(names)
    pairs = [(label, (label + step) % count, 5) for label in range(count) for step in (0, 1)]
    png = facts.answers.mistake_pictures[0].png
    sure = Answer(guess=count - 1, confidence=0.75)
    shown = tuple(
        Picture(index=label, label=label, onnxruntime=sure, full_precision=sure, pytorch=sure, png=png)
        for label in range(min(count, 12))
    )
    answers = Answers(
        images=10 * count,
        confusion=Confusion(images=(10,) * count, counts=tuple(pairs)),
        disagreements=count,
        changed=count,
        disagreement_pictures=shown,
        changed_pictures=shown,
        mistake_pictures=shown,
    )
    return dataclasses.replace(facts, classes=names, answers=answers)


def long_network(facts: ReportFacts) -> ReportFacts:
    """More than a hundred layers, each of which is also read much later."""
    blocks = [layer for layer in facts.layers if layer.weights is not None and layer.values]
    layers: list[Layer] = []
    for index in range(120):
        name = f"features.{index}.a_rather_long_name_of_a_block.convolution.{index}"
        reads = tuple(layers[place].name for place in {index - 1, index // 2} if 0 <= place < index)
        layers.append(dataclasses.replace(blocks[index % len(blocks)], name=name, reads=reads or ("pixels",)))
    return dataclasses.replace(facts, layers=tuple(layers))


def failed(facts: ReportFacts) -> ReportFacts:
    failures = ("layer2.0.conv1: 7 of 1,024 integers differ, " + "x" * 300,)
    certificate = dataclasses.replace(
        facts.certificate,
        passed=False,
        failures=failures,
        first_different_unit="layer2.0.conv1",
        processor_note="Note.",
    )
    return dataclasses.replace(facts, certificate=certificate, latency=None)


def unlabelled(facts: ReportFacts) -> ReportFacts:
    none = dataclasses.replace(facts.answers, confusion=None, mistake_pictures=())
    return dataclasses.replace(facts, answers=none, history=())


EVIL = ("<script>document.title = 'taken'</script>", '" onload="alert(1)', "&amp;", "N" * 200)
PAGES = {
    "one channel": lambda facts: facts,
    "two classes": lambda facts: with_classes(facts, ("no", "yes")),
    "a thousand classes": lambda facts: with_classes(facts, tuple(f"n{number:08d}" for number in range(1000))),
    "names that are HTML": lambda facts: with_classes(facts, EVIL),
    "120 layers": long_network,
    "a failed check": failed,
    "no labels": unlabelled,
}


@pytest.mark.parametrize("kind", PAGES)
def test_the_page_is_whole_quiet_alone_and_fits(kind: str, facts: ReportFacts, open_page: Open, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    changed = PAGES[kind](facts)
    file.write_text(render(changed), encoding="utf-8")
    assert file.stat().st_size < 5_000_000
    windows = WINDOWS if kind == "one channel" else WINDOWS[::3]
    for width, scheme in windows:
        visit = open_page(file.as_uri(), width=width, scheme=scheme, offline=True)
        assert visit.page.locator("main section").evaluate_all("found => found.map(one => one.id)") == list(SECTIONS)
        assert visit.page.title() == f"{changed.network} on {changed.data}: mecdeploy report"
        visit.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert visit.overflow <= 0, f"{width} pixels, {scheme}: {visit.overflow} too wide"
        assert (visit.errors, visit.requests) == ([], [file.as_uri()])
        broken = "found => found.filter(one => !one.complete || one.naturalWidth === 0).length"
        assert visit.page.locator("img").evaluate_all(broken) == 0
        assert visit.page.locator("img:not([alt])").count() == 0
        assert visit.page.locator("figure:not(:has(img)):not([aria-label])").count() == 0


def test_both_colour_schemes_can_be_read(facts: ReportFacts, open_page: Open, tmp_path: Path) -> None:
    """Text against what lies behind it, and the ink of a plot: at least 4.5 to 1 (WCAG 2.2, 1.4.3)."""
    file = tmp_path / "report.html"
    file.write_text(render(facts), encoding="utf-8")
    for scheme in ("light", "dark"):
        page = open_page(file.as_uri(), scheme=scheme).page
        paper = colour(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (luminance(paper) > 0.5) is (scheme == "light")
        for selector in ("h1", "p", ".quiet", "nav a", "summary", ".card p", "td", ".verdict", ".bits"):
            ink = colour(page.locator(selector).first.evaluate("one => getComputedStyle(one).color"))
            assert contrast(ink, paper) > 4.5, f"{scheme}: {selector}"
        ink = colour(page.locator(".plots svg text").first.evaluate("one => getComputedStyle(one).fill"))
        assert contrast(ink, paper) > 4.5, f"{scheme}: plot"


def test_links_lead_to_their_sections(facts: ReportFacts, open_page: Open, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    file = tmp_path / "report.html"
    file.write_text(render(facts), encoding="utf-8")
    visit = open_page(file.as_uri(), width=390)
    assert visit.page.locator("nav a").evaluate_all("found => found.map(one => one.hash)") == [
        f"#{s}" for s in SECTIONS
    ]
    visit.page.locator("nav a", has_text="Confusion").click()
    expect(visit.page.locator("#confusion h2")).to_be_in_viewport(timeout=60_000)
    assert visit.page.locator("#confusion td.hit").count() > 0


def colour(css: str) -> tuple[float, float, float]:
    """rgb(27, 31, 36) as shares."""
    red, green, blue = (int(part) / 255 for part in css[css.index("(") + 1 : -1].split(",")[:3])
    return red, green, blue


def luminance(rgb: tuple[float, float, float]) -> float:
    """Relative luminance by WCAG 2.2."""
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
