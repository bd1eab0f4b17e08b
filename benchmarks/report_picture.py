"""The picture of a report in README.md: the demo's run, reported, and the top of its page in a browser.

Run from the repository's root, with mecdeploy[report], playwright and a Chromium: python -m benchmarks.report_picture
It takes a minute and a half on two cores. What the page shows is what this machine measured just then.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "report.png"
WIDTH, HEIGHT = 1280, 1120
COLOURS = 128
"""Of the page's few tones and their blends at the edges of letters; all of them would take three times the bytes."""
LARGEST = 200_000


def main() -> None:
    """Train, report, photograph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="A finished and exported run. Default: the demo's, trained for it.")
    parser.add_argument("--out", type=Path, default=PICTURE)
    given = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("no Chromium on the PATH; install one (apt-get install chromium)")
    import mecdeploy
    from mecdeploy.demo import run_demo

    out, own = given.out.absolute(), given.run and given.run.absolute()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # the page shows no path of this machine
        run = Path("runs/digits")
        if own is None:
            run_demo(run, say=print)
        else:
            shutil.copytree(own, run)
        content = smaller(photograph(mecdeploy.report(run).page.absolute(), browser))
    if len(content) > LARGEST:
        sys.exit(f"the picture has {len(content):,} bytes; lower HEIGHT or COLOURS until it has {LARGEST:,}")
    out.write_bytes(content)
    print(f"{given.out}: {len(content):,} bytes")


def photograph(page: Path, browser: str) -> bytes:
    """The top of a page as PNG, in light colours."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=browser)
        window = launched.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        window.goto(page.as_uri())
        taken = window.screenshot()
        launched.close()
    return taken


def smaller(png: bytes) -> bytes:
    """The same picture in few colours."""
    from PIL import Image

    content = BytesIO()
    Image.open(BytesIO(png)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(
        content, "PNG", optimize=True
    )
    return content.getvalue()


if __name__ == "__main__":
    main()
