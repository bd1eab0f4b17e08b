"""What a study came to, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mecdeploy.study.measuring import MeasuredRow
from mecdeploy.study.results import Record, by_seed, partner_of
from mecdeploy.study.statistics import Difference, Spread, paired_difference, spread


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one width in one regime, over its seeds.

    validation, test: accuracy in percent; test is None where the test images were not read. difference,
    test_difference: to the baseline in points, None for the baseline itself and for what has no partner.
    """

    regime: str
    method: str
    bits: str
    validation: Spread
    difference: Difference | None
    test: Spread | None
    test_difference: Difference | None


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    """A study as far as it is done.

    runs: how many it has. records: of the finished ones, as in results.jsonl. measured: what study.measures asks for.
    failures: run -> its last line.
    untested: runs that have come after the test images were read. notes: what else there is to say, in sentences.
    """

    out: Path
    runs: int
    baseline: str
    records: Sequence[Record]
    rows: Sequence[Row]
    measured: Sequence[MeasuredRow] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    untested: Sequence[str] = ()
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """All but the records, JSON-able."""
        described = dataclasses.asdict(dataclasses.replace(self, records=()))
        del described["out"], described["records"]
        return {"finished": len(self.records), **described}


def rows(records: Sequence[Record], tests: Sequence[Record], baseline: str) -> list[Row]:
    """The groups of the records, in their order, but those without bits first in their regime.

    A baseline without bits (fp32) is the partner of every width.
    """
    validation, test = by_seed(records, "accuracy", 100.0), by_seed(tests, "accuracy", 100.0)
    found = []
    for group, values in validation.items():
        regime, method, bits = group
        partner = partner_of(group, baseline, validation)
        tested = test.get(group)
        found.append(
            Row(
                regime=regime,
                method=method,
                bits=bits,
                validation=spread(list(values.values())),
                difference=paired_difference(values, validation[partner]) if partner else None,
                test=spread(list(tested.values())) if tested else None,
                test_difference=paired_difference(tested, test.get(partner, {})) if tested and partner else None,
            )
        )
    regimes = list(dict.fromkeys(row.regime for row in found))
    return sorted(found, key=lambda row: (regimes.index(row.regime), row.bits != ""))
