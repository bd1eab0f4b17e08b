"""`mecdeploy.report`: gathers the facts of a run, and writes them as a page and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mecdeploy.errors import UserError
from mecdeploy.run_folder import require_run, write_atomically, write_json

if TYPE_CHECKING:
    from mecdeploy.run_report.facts import ReportFacts

PAGE = "report.html"
_LIBRARIES = ("jinja2", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The files that were written, and what they say."""

    page: Path
    data: Path
    facts: ReportFacts

    @property
    def passed(self) -> bool:
        """Whether the check that the report shows passed."""
        return self.facts.certificate.passed


def report(
    run: str | Path,
    model: str | Path | None = None,
    *,
    out: str | Path | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> RunReport:
    """Write one HTML page about a finished run, and the same facts as JSON beside it, replacing older ones.

    run: its folder. model: its exported file, by default RUN/model.onnx. out: the page, by default RUN/report.html; the
    JSON has its name and ends in .json. The file is checked anew (and parity.json written) unless parity.json speaks of
    these very bytes and images on this processor. progress: called with (what, done, total).
    Raises UserError for a folder that is no run, a run that is not exported, a missing library; TrainingError for a run
    that has not finished or has no quantised network; CheckError for a file that is not ours; OSError. A check that
    fails is no error: the page says so, and `passed` is False.
    """
    folder = require_run(Path(run))
    page = Path(out) if out is not None else folder.path / PAGE
    if page.suffix.lower() not in (".html", ".htm"):
        raise UserError(
            f"{page}: a report is one HTML file and a .json beside it; give --out a name that ends in .html."
        )
    if not page.parent.is_dir():
        raise UserError(f"{page.parent}: no such folder; make it, or choose another --out.")
    for library in _LIBRARIES:
        if find_spec(library) is None:
            raise UserError(f"a report needs {library}; install it with `pip install 'mecdeploy[report]'`.")
    from mecdeploy.run_report.gathering import gather
    from mecdeploy.run_report.page import render

    facts = gather(Path(run), None if model is None else Path(model), progress)
    progress("page", 0, 1)
    content = render(facts)
    progress("page", 1, 1)
    data = page.with_suffix(".json")
    write_json(data, facts.to_json())
    write_atomically(page, content.encode())
    return RunReport(page=page, data=data, facts=facts)
