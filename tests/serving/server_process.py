"""`mecdeploy serve` as a process of its own, asked over loopback with the standard library."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import mecdeploy

PATIENCE = 60.0
"""Seconds: of a process that starts, or ends, on a busy machine."""


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


class ServerProcess:
    """Started on entering, on a free port; killed on leaving, if it still runs."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self._log = folder / f"server-{time.monotonic_ns()}.log"
        environment = {**os.environ, "PYTHONPATH": str(Path(mecdeploy.__file__).parents[1]), "PYTHONWARNINGS": "error"}
        command = [sys.executable, "-m", "mecdeploy", "serve", *arguments, "--port", "0"]
        with self._log.open("w") as stream:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=stream, stderr=stream)
        self.address = ""

    def __enter__(self) -> ServerProcess:
        until(lambda: self._found_address() or self.process.poll() is not None, "an address in the log")
        assert self.process.poll() is None, self.log
        until(self._ready, f"ready: {self.log}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def log(self) -> str:
        """All that it has said."""
        return self._log.read_text()

    @property
    def host(self) -> str:
        """127.0.0.1:PORT."""
        return self.address.removeprefix("http://")

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
        """Status and text of an answer."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.address + path, data=body, headers=named)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, series: str) -> float:
        """The value of a series at /metrics; 0 where it has none yet."""
        found = re.search(rf"^{re.escape(series)} (\S+)$", self.ask("/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def end(self, signal: int) -> int:
        """Send a signal and wait for the exit code."""
        self.process.send_signal(signal)
        return self.process.wait(PATIENCE)

    def _found_address(self) -> bool:
        found = re.search(r"serving address=(http://\S+)", self.log)
        self.address = found[1] if found else ""
        return found is not None

    def _ready(self) -> bool:
        assert self.process.poll() is None, self.log
        try:
            return self.ask("/v2/health/ready")[0] == 200
        except OSError:
            return False
