"""Imports run only downwards, and the witness shares no code with what it checks."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "mecdeploy": {"training", "export", "runtime_checks"},
    "training": set(),
    "export": {"training"},
    "runtime_checks": set(),
}
CAPTURE = "export/capture.py"
MAY_IMPORT_TORCH = (CAPTURE, "export/fragments.py")
WITNESS_MAY_IMPORT = {
    "numpy",
    "onnx",
    "onnxruntime",
    "google",
    "mecdeploy",
    *sys.stdlib_module_names,
}  # google: protobuf


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a module, in functions and by import_module("...") too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # from mecdeploy import export: the room is in the alias
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def violations(path: str, source: str) -> list[str]:
    """What the module at `path`, relative to the root, imports and must not."""
    room = path.split("/")[0]
    found = []
    for name in imported(ast.parse(source)):
        top, *rest = name.split(".")
        other = rest[0] if top == "mecdeploy" and rest else ""
        if other not in BELOW:
            other = "mecdeploy" if top == "mecdeploy" and rest != ["__version__"] else ""
        relative_or_bare = top in ("", "training", "export", "runtime_checks")
        upwards = other not in ("", room, *BELOW[room])
        knows_training = room == "export" and other == "training" and path != CAPTURE
        knows_torch = room == "export" and top == "torch" and path not in MAY_IMPORT_TORCH
        in_the_witness = room == "runtime_checks" and top not in WITNESS_MAY_IMPORT
        if relative_or_bare or upwards or knows_training or knows_torch or in_the_witness:
            found.append(name)
    return found


MODULES = sorted(path.relative_to(ROOT).as_posix() for room in BELOW for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES)
def test_no_module_imports_upwards(path: str) -> None:
    assert violations(path, (ROOT / path).read_text()) == []


def test_every_room_was_looked_at() -> None:
    assert {path.split("/")[0] for path in MODULES} == set(BELOW)
    assert len(MODULES) > 40


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("runtime_checks/a.py", "import torch"),
        ("runtime_checks/a.py", "def f():\n    from torch import nn"),
        ("runtime_checks/a.py", "from mecdeploy.training.units import Unit"),
        ("runtime_checks/a.py", "from mecdeploy import export"),
        ("runtime_checks/a.py", "import scipy.stats"),
        ("export/passes/a.py", "from mecdeploy.training.model import QuantizedModel"),
        ("export/emission/a.py", "import torch"),
        ("export/fragments.py", "from mecdeploy.training.movement import FloatUnit"),
        ("export/capture.py", "from mecdeploy.runtime_checks import check_model"),
        ("training/a.py", "import mecdeploy.export.graph"),
        ("training/data/a.py", "from mecdeploy.config import resolve"),
        ("training/a.py", "from importlib import import_module\nimport_module('mecdeploy.export')"),
        ("training/a.py", "from mecdeploy import train"),
        ("mecdeploy/a.py", "from training.config import TrainConfig"),
        ("mecdeploy/a.py", "import runtime_checks"),
        ("training/a.py", "from . import config"),
    ],
)
def test_the_guard_sees_a_violation(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("export/capture.py", "import torch\nfrom mecdeploy.training.model import QuantizedModel"),
        ("export/fragments.py", "import torch\nfrom torch import fx"),
        ("export/emission/model.py", "from mecdeploy import __version__"),
        ("mecdeploy/api.py", "from mecdeploy.runtime_checks import check_model\nimport torch"),
        (
            "runtime_checks/a.py",
            "import numpy as np\nimport onnxruntime\nfrom mecdeploy.runtime_checks.errors import CheckError",
        ),
    ],
)
def test_the_guard_lets_the_rest_pass(path: str, source: str) -> None:
    assert violations(path, source) == []
