"""The quickstart and the tutorial do what they say: their shell blocks, one script each, run in an empty folder."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PRELUDE = """set -euo pipefail
trap 'jobs -p | xargs --no-run-if-empty kill 2>/dev/null || true' EXIT
"""
# Files and no shell functions: $! is then the server itself. What `pip install` would install is what is tested.
PROGRAMS = {
    "pip": "exit 0",
    "python": f'exec {sys.executable} "$@"',
    "mecdeploy": f'exec {sys.executable} -m mecdeploy "$@"',
}
TOOLS = [tool for tool in ("bash", "curl") if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(TOOLS), reason=f"the documents need {', '.join(TOOLS)}")


def script(page: str, port: int) -> str:
    """All shell blocks of a page, on a free port."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    return PRELUDE + "\n".join(blocks).replace("8000", str(port))


def run(page: str, folder: Path, environment: dict[str, str]) -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    programs, work = folder / "bin", folder / "work"
    programs.mkdir()
    work.mkdir()
    for name, line in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    variables = {**environment, "PATH": f"{programs}:{environment['PATH']}"}
    command = ["bash", "-c", script(page, port)]
    done = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{page}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_quickstart(tmp_path: Path, environment: dict[str, str]) -> None:
    out = run("quickstart.md", tmp_path, environment)
    assert re.search(r"integers different +0 ", out)
    assert re.search(r"^seven\.png: 7 \d", out, re.MULTILINE), "predict"
    assert '"7"' in out.splitlines()[-1], "the server's answer"


def test_the_tutorial(tmp_path: Path, environment: dict[str, str]) -> None:
    out = run("tutorial.md", tmp_path, environment)
    assert re.search(r"integers different +0 ", out)
    predicted = re.findall(r"^photos/seven/\d+\.png: (\w+)", out, re.MULTILINE)
    assert len(predicted) > 5 and predicted.count("seven") > 0.7 * len(predicted)
    served = out.splitlines()[-2:]
    assert "seven" in served[0] and "three" in served[1]
    assert (tmp_path / "work/runs/photos/model.onnx").stat().st_size < 100_000
