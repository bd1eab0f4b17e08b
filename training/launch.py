"""Which process of a job this is, as torchrun says it in the environment. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mecdeploy.training.errors import TrainingError

_VARIABLES = {
    "rank": "RANK",
    "size": "WORLD_SIZE",
    "local_rank": "LOCAL_RANK",
    "local_size": "LOCAL_WORLD_SIZE",
    "restarts": "TORCHELASTIC_RESTART_COUNT",
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One process among those of a job.

    rank, size: its number, from 0, and how many there are. local_rank, local_size: the same on this machine.
    restarts: how often torchrun has started the job again after a failure.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0


def launched(environment: Mapping[str, str] | None = None) -> Launch:
    """How this process was started; without WORLD_SIZE it is alone. Raises TrainingError for an environment cut short.

    environment: None for this process's own.
    """
    given = os.environ if environment is None else environment
    if "WORLD_SIZE" not in given:
        return Launch()
    values = {}
    for field, variable in _VARIABLES.items():
        text = given.get(variable, "0" if field == "restarts" else "")
        if not text.isdecimal():
            state = f"is {text!r}" if variable in given else "is not set"
            raise TrainingError(
                f"WORLD_SIZE is {given['WORLD_SIZE']!r}, but {variable} {state}; start the processes with torchrun, "
                "or unset WORLD_SIZE."
            )
        values[field] = int(text)
    if values["size"] == 1:
        return Launch(restarts=values["restarts"])
    return Launch(**values)
