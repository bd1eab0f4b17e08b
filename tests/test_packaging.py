"""The wheel holds everything, and the documents name only what exists."""

from __future__ import annotations

import configparser
import importlib
import json
import os
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

import mecdeploy
from mecdeploy.cli import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def test_every_folder_of_modules_is_listed() -> None:
    """setuptools drops an unlisted sub-package without a word."""
    folders = SETUPTOOLS["package-dir"]
    found = set()
    for package, folder in folders.items():
        for module in (ROOT / folder).rglob("*.py"):
            parts = module.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *parts)))
    assert sorted(found) == sorted(SETUPTOOLS["packages"])


def test_every_package_has_a_table_of_contents() -> None:
    for package in SETUPTOOLS["packages"]:
        assert importlib.import_module(package).__doc__, f"{package}/__init__.py has no docstring"


def test_types_and_licence_are_shipped() -> None:
    assert "py.typed" in SETUPTOOLS["package-data"]["mecdeploy"]
    assert (ROOT / "mecdeploy" / "py.typed").is_file()
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text().strip().startswith("Apache License")


def test_the_console_script_exists() -> None:
    module, name = PROJECT["project"]["scripts"]["mecdeploy"].split(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_the_changelog_has_this_version() -> None:
    assert f"## {mecdeploy.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_has_a_reason() -> None:
    reasons = (ROOT / "docs" / "decisions.md").read_text()
    for requirement in PROJECT["project"]["dependencies"]:
        name = re.split(r"[<>=!~ ]", requirement)[0]
        assert re.search(rf"^\| {re.escape(name)}\b", reasons, re.MULTILINE), f"docs/decisions.md has no line on {name}"


def test_nothing_pins_a_release_or_names_an_index() -> None:
    for requirement in PROJECT["project"]["dependencies"]:
        assert "==" not in requirement
    for name in ("pyproject.toml", "tox.ini", "README.md", ".ci/run"):
        assert "index-url" not in (ROOT / name).read_text()


def test_ci_runs_the_readmes_test_command() -> None:
    command = "pip install tox && tox"
    assert f"\n{command}\n" in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == command
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_tox_runs_the_wheel() -> None:
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    assert {"lint", "types", "docs", "tests", "parity"} <= set(re.split(r"[,\s]+", tox["tox"]["env_list"]))
    assert tox["testenv"]["package"] == "wheel"
    for name in tox.sections():
        assert "python -m pytest" not in tox[name].get("commands", ""), "that would test the checkout"


def documented_commands() -> list[tuple[str, str]]:
    """Each `mecdeploy ...` line of a code block, with the document that shows it."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```(?:sh|console|bash)\n(.*?)```", document.read_text(), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            for part in (part for line in lines for part in line.split("&&")):
                command = part.strip().removeprefix("$ ").removesuffix("&")  # one that goes on in the background
                if command.startswith("mecdeploy"):
                    found.append((document.name, command.split("#")[0].strip()))
    return found


@pytest.mark.parametrize(("document", "command"), documented_commands())
def test_documented_commands_parse(document: str, command: str) -> None:
    _, *arguments = shlex.split(command)
    context = cli.make_context("mecdeploy", list(arguments))
    if arguments and not arguments[0].startswith("-"):
        subcommand = cli.get_command(context, arguments[0])
        assert subcommand is not None, f"{document}: no command {arguments[0]!r}"
        subcommand.make_context(arguments[0], list(arguments[1:]), parent=context)


def test_the_readme_shows_every_command() -> None:
    shown = {command.split()[1] for document, command in documented_commands() if document == "README.md"}
    assert shown >= set(cli.list_commands(click.Context(cli)))


def test_docs_cli_names_every_option_and_key() -> None:
    from mecdeploy.training.config import TrainConfig

    text = (ROOT / "docs" / "cli.md").read_text()
    for command in cli.commands.values():
        for parameter in command.params:
            for option in parameter.opts if isinstance(parameter, click.Option) else ():
                assert f"`{option}" in text, f"docs/cli.md does not explain {option}"
    tables = re.split(r"^\| (?:`\[(\w+)\]`|top level) \| default \|", text, flags=re.MULTILINE)[1:]
    rows = dict(zip(tables[::2], tables[1::2], strict=True))
    settings = TrainConfig().describe()
    sections = {name: value for name, value in settings.items() if name in rows}
    for section, keys in {None: {key: settings[key] for key in settings.keys() - sections}, **sections}.items():
        for key, value in keys.items():
            shown = json.dumps(list(value) if isinstance(value, tuple) else value)
            plain = {f"`{value}`", f"`{shown}`", shown}
            found = re.search(rf"^\| `{key}` \| (.*?) \|", rows[section], re.MULTILINE)
            assert found and found[1] in plain, f"docs/cli.md does not explain {section}.{key}, by default {shown}"


def test_the_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference" / "api.md").read_text()
    shown = {name for names in re.findall(r"^```\{api\} (.*)", text, re.MULTILINE) for name in names.split(", ")}
    assert shown >= set(mecdeploy.__all__) - {"__version__"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"
