"""Runs of the tiny network in processes of their own that are killed as by a power cut, and what to compare them with.

`Nursery` starts one process that imports torch once and forks a child for each run: children so start at once, and
none inherits an autograd engine that has run (torch refuses to work in such a fork). What a run is, and where it is
killed, is data: see `run` and `Death`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

KILLED = -signal.SIGKILL
OFTEN = 1e-9
"""Of schedule.save_minutes: a checkpoint after every step but an epoch's last, and after every epoch."""


@dataclass(frozen=True, kw_only=True)
class Death:
    """Where a run is killed: at the call of this number (from 1) of a function, such as "os:replace".

    when: "before" the call, "after" it, or "half": a writer of a file (an argument that is a path) has then written
    half of its bytes. matching: only calls count that have an argument with these characters in it.
    """

    function: str
    number: int = 1
    when: str = "before"
    matching: str = ""


class Nursery:
    """A process whose children are runs. Use as a context manager."""

    def __enter__(self) -> Nursery:
        import mecdeploy

        found = os.pathsep.join([str(Path(mecdeploy.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": found},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(
        self,
        out: Path,
        *,
        schedule: dict[str, Any] | None = None,
        front_door: bool = False,
        death: Death | None = None,
        kill_after: float | None = None,
    ) -> int:
        """Train, or resume what is in `out`; returns the exit code: 0, 1 after an exception (printed), KILLED.

        schedule: of tiny_config. front_door: through mecdeploy.train, with run.toml and metrics.jsonl.
        kill_after: seconds after which it is killed, wherever it is then.
        """
        job = {"out": str(out), "schedule": schedule or {}, "front_door": front_door, "kill_after": kill_after}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({**job, "death": None if death is None else asdict(death)}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def die() -> NoReturn:
    """End this process at once: no handler, no `finally`, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def deadly(function: Callable[..., Any], death: Death) -> Callable[..., Any]:
    """`function`, with the death in it."""
    seen = [0]

    def call(*arguments: Any, **named: Any) -> Any:
        seen[0] += any(death.matching in str(argument) for argument in arguments)
        if seen[0] != death.number:
            return function(*arguments, **named)
        if death.when != "before":
            function(*arguments, **named)
        if death.when == "half":
            path = next(argument for argument in arguments if isinstance(argument, Path))
            os.truncate(path, path.stat().st_size // 2)
        die()

    return call


def run(job: dict[str, Any]) -> None:
    """One run, in a process of its own."""
    from tiny_run import tiny_config, tiny_dataset

    import mecdeploy.training.data
    from mecdeploy.training.loop import train

    mecdeploy.training.data.load_dataset = lambda *_, **__: tiny_dataset()  # type: ignore[assignment]
    if job["death"] is not None:
        death = Death(**job["death"])
        module, _, path = death.function.partition(":")
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for attribute in owners:
            owner = getattr(owner, attribute)
        setattr(owner, name, deadly(getattr(owner, name), death))
    out, config = Path(job["out"]), tiny_config(**job["schedule"])
    if job["front_door"]:
        mecdeploy.train(config, out, resume=(out / "run.toml").exists())
    else:
        train(config, tiny_dataset(), out, resume=out.exists())


def serve() -> None:
    """For each job on stdin, run it in a child and print its exit code."""
    import torch
    import torch._inductor.config  # noqa: F401 (what deterministic algorithms ask for)
    from tiny_run import build_tiny, tiny_config, tiny_dataset

    import mecdeploy.api  # noqa: F401
    import mecdeploy.export  # noqa: F401
    import mecdeploy.training.state

    mecdeploy.training.state.build_model = build_tiny  # type: ignore[assignment]
    mecdeploy.training.state.State(tiny_config(), tiny_dataset(), torch.device("cpu"))  # traces once for all children
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                run(job)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if job["kill_after"] is not None:
            time.sleep(job["kill_after"])
            os.kill(child, signal.SIGKILL)  # one that has ended already keeps its id until it is waited for
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
