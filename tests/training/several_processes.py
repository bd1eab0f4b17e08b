"""Starts processes as torchrun does, with RANK and so on in the environment, but without its seconds of start-up."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Part = Callable[[Path], Any]
"""What one process does; its result, JSON-able, is kept."""

LIMIT = 300
"""Seconds after which processes that wait for each other are ended."""


def run_parts(parts: list[Part], folder: Path, count: int = 2) -> dict[str, list[Any]]:
    """Each part in `count` processes that are started once; returns the results by the part's name, then by rank.

    A process may end itself in its last part: that has no result then.
    """
    port = _free_port()
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_work, args=(rank, count, port, parts, folder)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(LIMIT)
        if process.is_alive():
            process.kill()  # its results are missed
    return {part.__name__: [_result(folder, part, rank) for rank in range(count)] for part in parts}


@contextlib.contextmanager
def environment(rank: int, count: int, port: int) -> Iterator[None]:
    """What torchrun would set."""
    numbers = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    values = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}}
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _work(rank: int, count: int, port: int, parts: list[Part], folder: Path) -> None:
    import warnings

    warnings.simplefilter("error")
    for part in parts:
        with environment(rank, count, port):
            result = part(folder)
        (folder / f"{part.__name__}-{rank}.json").write_text(json.dumps(result))


def _result(folder: Path, part: Part, rank: int) -> Any:
    path = folder / f"{part.__name__}-{rank}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        port: int = each.getsockname()[1]
    return port
