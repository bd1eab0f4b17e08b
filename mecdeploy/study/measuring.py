"""What can be measured of the runs beside their accuracy: a record for each, and what these come to over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mecdeploy import measures
from mecdeploy.run_folder import RunFolder, write_json_lines
from mecdeploy.study.plan import RUNS
from mecdeploy.study.results import AXES, RESULTS, Record, by_seed, partner_of, read_records
from mecdeploy.study.statistics import Difference, Spread, paired_difference, spread

MEASURED = "measures.jsonl"


@dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """One method at one width in one regime.

    values: name of the measure -> its spread over seeds. differences: to the baseline, empty for what has no partner.
    """

    regime: str
    method: str
    bits: str
    values: Mapping[str, Spread]
    differences: Mapping[str, Difference]


Kinds = Mapping[str, Mapping[str, int]]
"""Measure -> its options, as study.measures has them."""


def unmeasured(out: Path, kinds: Kinds) -> list[str]:
    """The finished runs that were not measured so. Other options, such as more images, are another measurement."""
    known = {found["name"] for found in read_records(out / MEASURED) if found["measures"] == kinds}
    return [found["name"] for found in read_records(out / RESULTS) if found["name"] not in known]


def write_measures(out: Path, kinds: Kinds) -> None:
    """Measure what `unmeasured` names; each record is kept as soon as there is one."""
    left = unmeasured(out, kinds)
    known = {found["name"]: found for found in read_records(out / MEASURED)}
    for found in read_records(out / RESULTS):
        name = found["name"]
        if name in left:
            run = out / RUNS / name
            device = RunFolder(run).read_config().device
            values: dict[str, float] = {}
            for kind, options in kinds.items():
                values |= getattr(measures, kind)(run, device=device, **options).summary()
            known[name] = {**{key: found[key] for key in AXES}, "measures": kinds, "values": values}
            write_json_lines(out / MEASURED, known.values())


def measured_rows(records: Sequence[Record], baseline: str) -> list[MeasuredRow]:
    """The groups of the records, in their order."""
    keys = list(dict.fromkeys(key for found in records for key in found["values"]))
    flat = [{**{axis: found[axis] for axis in AXES}, **found["values"]} for found in records]
    columns = {key: by_seed([found for found in flat if key in found], key) for key in keys}
    rows = []
    for group in dict.fromkeys((found["regime"], found["method"], found["bits"]) for found in records):
        values = {key: column[group] for key, column in columns.items() if group in column}
        differences = {}
        for key, own in values.items():
            partner = partner_of(group, baseline, columns[key])
            found_difference = paired_difference(own, columns[key][partner]) if partner else None
            if found_difference is not None:
                differences[key] = found_difference
        spreads = {key: spread(list(own.values())) for key, own in values.items()}
        rows.append(
            MeasuredRow(regime=group[0], method=group[1], bits=group[2], values=spreads, differences=differences)
        )
    return rows
