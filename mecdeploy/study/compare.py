"""compare: run a whole study, or what is left of it, and say what came of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from mecdeploy.errors import UserError
from mecdeploy.run_folder import locked, write_atomically, write_json, write_json_lines
from mecdeploy.study import plots, tables
from mecdeploy.study.config import Study, read_study
from mecdeploy.study.measuring import MEASURED, measured_rows, unmeasured
from mecdeploy.study.plan import RUNS, Cell, plan
from mecdeploy.study.report import StudyReport, rows
from mecdeploy.study.results import RESULTS, Record, read_records, record
from mecdeploy.study.running import LOGS, SETTINGS, RunEvent, is_finished, require_unchanged, run_all, run_command
from mecdeploy.study.testing import TEST, dataset_of, require_test_images
from mecdeploy.training.config import DataConfig
from mecdeploy.training.events import ACCURACY
from mecdeploy.training.launch import launched

TABLE, MEASURES_TABLE, SUMMARY = "table.md", "measures.md", "summary.json"


def compare(
    config: str | Path,
    out: str | Path | None = None,
    *,
    jobs: int | None = None,
    report: Callable[[RunEvent], None] | None = None,
) -> StudyReport:
    """Run every cell of a study, several at once, and compare the methods seed by seed (docs/compare.md).

    config: study.toml. out: by default studies/ and its name; a study that is there already is continued: finished runs
    are kept, stopped ones resumed, failed and new ones started. jobs: runs at once, instead of study.jobs.
    report: called with what happens to a run.
    Writes results.jsonl after every run, and at the end table.md, summary.json, plots, and test.jsonl once.
    Raises UserError for a study that cannot be run, naming the table or run and the key; KeyboardInterrupt after
    Ctrl-C, when every run has saved. A run that fails is no error: the report's `failures` say why.
    """
    if launched().size > 1:
        raise UserError("compare starts processes of its own; run it without torchrun, and set study.jobs and devices.")
    folder = Path(out) if out is not None else default_out(Path(config))
    study, cells = open_study(config, folder)
    if study.axes.test and not (folder / TEST).exists() and not any(is_finished(folder, cell) for cell in cells):
        require_test_images(cells)
    for part in (RUNS, SETTINGS, LOGS):
        (folder / part).mkdir(parents=True, exist_ok=True)
    with locked(folder):
        failures = _run(study, folder, cells, jobs, report or (lambda event: None))
        if study.axes.test and not failures and not (folder / TEST).exists():
            failures |= _alone(study, folder, "test")
        if study.axes.measures and unmeasured(folder, study.axes.measures):
            failures |= _alone(study, folder, "measure", json.dumps(study.axes.measures))
        return _conclude(study, folder, cells, failures)


def open_study(config: str | Path, out: str | Path) -> tuple[Study, tuple[Cell, ...]]:
    """The study and its runs, refused as `compare` refuses them; reads and executes nothing else."""
    study = read_study(Path(config))
    cells = plan(study, Path(out))
    require_unchanged(Path(out), cells)
    return study, cells


def training_images(cells: Sequence[Cell]) -> list[int | None]:
    """How many images each run trains on, those it validates on not among them; loads each data set.

    None for images whose classes are those of a start that is still to be trained.
    """
    known: list[tuple[DataConfig, int]] = []
    images: list[int | None] = []
    for cell in cells:
        data = cell.config.data
        found = next((count for seen, count in known if seen == data), None)
        if found is None and not (cell.start and data.labels == "none"):
            found = len(dataset_of(cell.config).train)
            known.append((data, found))
        images.append(found)
    return images


def default_out(config: Path) -> Path:
    """Where the study of this file lies, unless somebody says otherwise."""
    return Path("studies") / config.stem


def _run(
    study: Study, out: Path, cells: Sequence[Cell], jobs: int | None, tell: Callable[[RunEvent], None]
) -> dict[str, str]:
    """Run what is left, with results.jsonl in step; returns run -> why it failed."""
    axes = study.axes
    finished = {cell.name: record(out, cell) for cell in cells if is_finished(out, cell)}

    def write() -> None:
        write_json_lines(out / RESULTS, (finished[cell.name] for cell in cells if cell.name in finished))

    def follow(event: RunEvent) -> None:
        if event.what == "finished":
            found = finished[event.cell.name] = record(out, event.cell)
            write()
            event = dataclasses.replace(event, accuracy=found["accuracy"])
        tell(event)

    write()
    return run_all(
        out,
        cells,
        jobs=jobs or axes.jobs or len(axes.devices) or 1,
        threads=axes.threads,
        devices=axes.devices,
        tell=follow,
    )


def _alone(study: Study, out: Path, command: str, *arguments: str) -> dict[str, str]:
    """Execute what is no run, in a process of its own; as `_run`, by the command's name."""
    device = next(iter(study.axes.devices), None)
    failed = run_command(out, (command, str(out), *arguments), threads=study.axes.threads, device=device)
    return {} if failed is None else {command: failed}


def _conclude(study: Study, out: Path, cells: Sequence[Cell], failures: dict[str, str]) -> StudyReport:
    """Write what the runs came to, and return it."""
    records = read_records(out / RESULTS)
    planned = {cell.name for cell in cells}
    tests = [test for test in read_records(out / TEST) if test["name"] in planned]
    tested = {test["name"] for test in tests}
    measured = [
        found
        for found in read_records(out / MEASURED)
        if found["name"] in planned and found["measures"] == study.axes.measures
    ]
    found_rows = rows(records, tests, study.axes.baseline)
    found = StudyReport(
        out=out,
        runs=len(cells),
        baseline=study.axes.baseline,
        records=records,
        rows=found_rows,
        measured=measured_rows(measured, study.axes.baseline),
        failures=failures,
        untested=[run["name"] for run in records if run["name"] not in tested] if tests else [],
        notes=[*plots.write(out, found_rows, records), *_other_measures(records)],
    )
    if found.measured:
        write_atomically(out / MEASURES_TABLE, tables.measures_markdown(found).encode())
    write_atomically(out / TABLE, tables.markdown(found).encode())
    write_json(out / SUMMARY, found.to_json())
    return found


def _other_measures(records: Sequence[Record]) -> list[str]:
    """A sentence about runs whose validation figure is no accuracy, if there are any."""
    found = [run["name"] for run in records if run["measure"] != ACCURACY]
    return (
        [f"Without labels, validation is agreement with the teacher, no accuracy: {', '.join(found)}."] if found else []
    )
