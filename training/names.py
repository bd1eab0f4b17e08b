"""What the words of a config refer to: a user's file, published weights. Imports no torch, and opens nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

_USER_FILE = re.compile(r"(?P<file>.+\.py):(?P<factory>[^\W\d]\w*)")
_MAY_CHANGE = (
    "device",
    "data.root",
    "data.download",
    "data.workers",
    "schedule.compile",
    "schedule.keep_checkpoints",
    "schedule.save_minutes",
)


def user_file(model: str) -> tuple[Path, str] | None:
    """The file and the name in it of "path/to/file.py:factory"; None for the name of a known network."""
    match = _USER_FILE.fullmatch(model)
    return None if match is None else (Path(match["file"]), match["factory"])


def are_published(weights: str) -> bool:
    """Whether `weights` is a name among a network's published weights (DEFAULT, IMAGENET1K_V1), not a file."""
    return weights.isidentifier()


def no_match(key: str, pattern: str, units: Sequence[str]) -> str:
    """What to say of a pattern under `key` that matches none of the units: which one was meant, or which there are."""
    close = get_close_matches(pattern, units, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"Units are: {', '.join(units[:8])}, ..."
    return f"{key}: {pattern!r} matches no unit. {hint}"


def may_change(key: str, then: object, now: object) -> bool:
    """Whether a resumed run may have another value of this key.

    Where it computes, where its files lie and when it is saved may change.

    key: dotted, as in "data.root". What it computes may not: published weights bring their own normalisation.
    """
    if key == "weights":
        return all(isinstance(value, str) and value != "" and not are_published(value) for value in (then, now))
    if key == "model.name":
        files = [user_file(value) for value in (then, now) if isinstance(value, str)]
        return len(files) == 2 and None not in files and files[0][1] == files[1][1]  # type: ignore[index]
    return key in _MAY_CHANGE
