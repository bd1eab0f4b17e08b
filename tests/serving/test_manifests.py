"""The manifests of docs/serving-clusters.md: what they start exists, with these options and settings.

KServe's own schema, 2 MB of a CRD, is not held here; the document says against which one the manifests were validated.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from mecdeploy.cli import cli
from mecdeploy.serving.config import ServeConfig

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "serving-clusters.md").read_text(encoding="utf-8")
MANIFESTS: list[dict[str, Any]] = [
    yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
]


@pytest.fixture(scope="module")
def predictors() -> list[dict[str, Any]]:
    services = [manifest for manifest in MANIFESTS if manifest.get("kind") == "InferenceService"]
    assert {service["apiVersion"] for service in services} == {"serving.kserve.io/v1beta1"}
    return [service["spec"]["predictor"] for service in services]


def test_kserves_triton_is_new_enough_for_our_files(predictors: list[dict[str, Any]]) -> None:
    (model,) = (predictor["model"] for predictor in predictors if "model" in predictor)
    assert (model["modelFormat"], model["protocolVersion"]) == ({"name": "triton", "version": "2"}, "v2")
    release = re.fullmatch(r"(\d+)\.(\d+)-py3", model["runtimeVersion"])
    assert release and (int(release[1]), int(release[2])) >= (26, 2)  # onnxruntime 1.24
    assert f"tritonserver:{model['runtimeVersion']}" in DOCUMENT, "another release than the one above it"


def test_the_container_of_mecdeploy_serve(predictors: list[dict[str, Any]]) -> None:
    (container,) = (one for predictor in predictors for one in predictor.get("containers", ()))
    program, command, *arguments = container["command"]
    assert program == "mecdeploy"
    serve = cli.get_command(click.Context(cli), command)
    assert serve is not None
    given = serve.make_context(command, arguments).params
    (port,) = (one["containerPort"] for one in container["ports"])
    assert given["port"] == port == container["readinessProbe"]["httpGet"]["port"]
    assert given["host"] == "0.0.0.0", "nothing outside the container would reach it"
    assert given["models"] == ("/mnt/models",), "where KServe puts what STORAGE_URI names"
    assert {entry["name"] for entry in container["env"]} == {"STORAGE_URI", "PROTOCOL"}


def test_rays_application() -> None:
    (application,) = (one for manifest in MANIFESTS for one in manifest.get("applications", ()))
    module, _, name = application["import_path"].partition(":")
    source = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
    assert name in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    settings = dict(application["args"])
    assert settings.pop("replicas") == 2
    assert settings.keys() <= {field.name for field in dataclasses.fields(ServeConfig)}
    ServeConfig(**{**settings, "models": (settings["models"],)})
