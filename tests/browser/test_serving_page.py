"""The page of `mecdeploy serve` in a real browser: a picture in, the classes out, and nothing from elsewhere."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from visiting import Open, Visit

sys.path.append(str(Path(__file__).parents[1] / "serving"))
from server_process import ServerProcess  # noqa: E402
from serving_models import CLASSES, encoded, write_classifier  # noqa: E402


@pytest.fixture(scope="module")
def server(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("page")
    models = [write_classifier(folder / f"{name}.onnx", seed=seed) for seed, name in enumerate(("photos", "other"))]
    with ServerProcess([*map(str, models), "--max-body-mb", "0.1"], folder) as started:
        yield started


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cat & <b>dog.jpg"
    path.write_bytes(encoded(size=(300, 200), format="JPEG"))
    return path


def expected(server: ServerProcess, model: str, picture: Path) -> list[tuple[str, str]]:
    """What the server says to a client that is no browser."""
    status, text = server.ask(f"/v1/models/{model}/classify", picture.read_bytes(), content_type="image/jpeg")
    assert status == 200
    return [(entry["class"], f"{100 * entry['probability']:.1f} %") for entry in json.loads(text)["classes"]]


def shown(visit: Visit) -> list[tuple[str, str]]:
    page = visit.page
    page.wait_for_selector("ol li")
    return list(
        zip(page.locator("li .name").all_text_contents(), page.locator("li .percent").all_text_contents(), strict=True)
    )


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_a_chosen_picture(open_page: Open, server: ServerProcess, picture: Path, width: int, scheme: str) -> None:
    visit = open_page(server.address + "/", width=width, scheme=scheme)
    page = visit.page
    page.wait_for_selector("#choice:visible")
    page.set_input_files("#file", picture)
    found = shown(visit)
    assert found == expected(server, "photos", picture)
    assert {name for name, _ in found} == set(CLASSES)  # "<b>car</b>" is shown as it is written
    assert page.locator("h2").text_content() == "Most likely" + found[0][0]
    assert page.locator("#name").text_content() == picture.name
    assert page.evaluate("document.getElementById('preview').naturalWidth") == 300
    styles = page.eval_on_selector_all(".bar div", "bars => bars.map((bar) => bar.style.width)")
    widths = [float(style.removesuffix("%")) for style in styles]
    np.testing.assert_allclose(widths, [float(percent.removesuffix(" %")) for _, percent in found], atol=0.06)  # 0.1 %
    page.select_option("#model", "other")
    page.locator(".note", has_text="other, version ").wait_for()
    assert shown(visit) == expected(server, "other", picture)
    assert visit.overflow <= 0 and visit.errors == []
    assert all(address.startswith((server.address, f"blob:{server.address}")) for address in visit.requests)


def test_a_dropped_picture(open_page: Open, server: ServerProcess, picture: Path) -> None:
    visit = open_page(server.address + "/")
    content = base64.b64encode(picture.read_bytes()).decode()
    transfer = visit.page.evaluate_handle(
        """content => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            transfer.items.add(new File([bytes], "dropped.jpg", { type: "image/jpeg" }));
            return transfer;
        }""",
        content,
    )
    visit.page.dispatch_event("#drop", "dragover", {"dataTransfer": transfer})
    assert visit.page.locator("#drop.over").count() == 1
    visit.page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    assert shown(visit) == expected(server, "photos", picture)
    assert visit.page.locator("#drop.over").count() == 0 and visit.errors == []


def test_what_goes_wrong_is_said(open_page: Open, server: ServerProcess, picture: Path, tmp_path: Path) -> None:
    visit = open_page(server.address + "/")
    page = visit.page
    (tmp_path / "note.txt").write_text("no picture")
    (tmp_path / "broken.png").write_text("no picture either")
    (tmp_path / "large.png").write_bytes(bytes(200_000))
    for name, message in (
        ("note.txt", "note.txt is no JPEG or PNG file; choose another one."),
        ("broken.png", "the image is not an image that is read here (JPEG or PNG)."),
        ("large.png", "the body has more than 100000 bytes, which are the most that are read."),
    ):
        page.set_input_files("#file", tmp_path / name)
        page.wait_for_function("text => document.querySelector('.problem')?.textContent === text", arg=message)
    page.set_input_files("#file", picture)
    assert shown(visit) == expected(server, "photos", picture)


def test_the_page_can_be_used_without_a_mouse(open_page: Open, server: ServerProcess) -> None:
    page = open_page(server.address + "/").page
    page.wait_for_selector("#choice:visible")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "model"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    with page.expect_file_chooser():
        page.keyboard.press("Enter")
