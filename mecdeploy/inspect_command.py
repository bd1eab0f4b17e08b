"""`mecdeploy inspect`: the facts about an ONNX file, as tables or as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command(short_help="The facts about any ONNX file, and what onnxruntime makes of it.")
@click.argument("model", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON document.")
def inspect(model: Path, as_json: bool) -> None:
    """Say how MODEL, an ONNX file of any tool, stores its weights, and what onnxruntime computes in integers of it."""
    from rich.console import Console

    from mecdeploy import api, inspect_tables

    report = api.inspect(model)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
        return
    console = Console(file=sys.stdout, markup=False, emoji=False)  # names in a file are no markup
    for table in inspect_tables.everything(report):
        console.print(table, "")
    for warning in report.warnings:
        click.echo(f"Warning: {warning}", err=True)
