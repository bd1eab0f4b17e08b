"""The site: `tox -e docs`, or `sphinx-build -W -n docs build/site`. Needs no torch: sources are read, not imported."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import mecdeploy  # noqa: E402

project = "mecdeploy"
release = mecdeploy.__version__
author = "the mecdeploy authors"
copyright = f"{author}, Apache-2.0"

extensions = ["myst_parser", "sphinx_click", "public_api"]
html_theme = "furo"
html_title = f"mecdeploy {release}"
html_show_sphinx = False
html_copy_source = False

nitpicky = True
# Types in signatures are words here: they lead to numpy's, torch's and Python's own pages, which no build should fetch.
nitpick_ignore_regex = [("py:.*", ".*")]
myst_heading_anchors = 4  # a link to a heading works here as on a code host
myst_links_external_new_tab = False


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """The lists of links on the first page are the site's contents, so that the page reads well on a code host too.

    A page that is linked from none of them has no place in the contents, which Sphinx warns of.
    """
    if name != "index":
        return
    for section in re.split(r"^## ", source[0], flags=re.MULTILINE)[1:]:
        pages = re.findall(r"^\* \[[^]]*\]\(([\w/-]+)\.md\)", section, flags=re.MULTILINE)
        caption = section.splitlines()[0]
        source[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```\n"])


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", add_contents)
