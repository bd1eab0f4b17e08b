"""The same application as a deployment of Ray Serve, which takes the place of `mecdeploy serve`'s processes and port.

serve run mecdeploy.serving.ray_app:app models=/srv/models replicas=2
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from ray import serve
from starlette.applications import Starlette

from mecdeploy.errors import UserError
from mecdeploy.serving.app import build_app
from mecdeploy.serving.config import ServeConfig

_RAYS_OWN = ("host", "models", "port", "workers")
_SETTINGS: dict[str, type[Any]] = {
    field.name: type(field.default) for field in dataclasses.fields(ServeConfig) if field.name not in _RAYS_OWN
}


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """What `serve run`, or a configuration file's `args`, calls: `replicas`, and settings of ServeConfig.

    models may be one string with commas. Raises UserError for a setting that there is not, or whose value is none.
    """
    settings = dict(arguments)
    replicas = _number("replicas", settings.pop("replicas", 1), int)
    return deployment(_config(settings)).options(num_replicas=replicas).bind()


def deployment(config: ServeConfig) -> serve.Deployment:
    """A deployment of one replica; `.options(num_replicas=2).bind()` makes two. Each replica loads the models itself.

    A replica takes as many of Ray's CPUs as threads of onnxruntime, one unless config.threads says more. Host, port and
    workers are Ray's business and not read.
    """
    threads = config.threads or 1
    settings = dataclasses.replace(config, threads=threads)

    def application() -> Starlette:
        return build_app(settings)

    made: serve.Deployment = serve.deployment(
        name="mecdeploy",
        ray_actor_options={"num_cpus": threads},
        # Ray would hand a replica 5 requests at once: too few for a batch.
        max_ongoing_requests=config.max_queue,
        graceful_shutdown_timeout_s=config.drain_seconds,
    )(serve.ingress(application)())
    return made


def _config(arguments: Mapping[str, Any]) -> ServeConfig:
    if "models" not in arguments:
        raise UserError("models is missing; name a file or a folder, as in models=/srv/models.")
    models = arguments["models"]
    named = tuple(models.split(",")) if isinstance(models, str) else tuple(map(str, models))
    return ServeConfig(models=named, **{key: _value(key, value) for key, value in arguments.items() if key != "models"})


def _value(key: str, value: object) -> Any:
    if key not in _SETTINGS:
        match = get_close_matches(key, _SETTINGS, n=1)
        hint = f"did you mean {match[0]}?" if match else "docs/cli.md lists the settings of serve."
        raise UserError(f"{key} is no setting of a deployment; {hint}")
    return _number(key, value, _SETTINGS[key])


def _number(key: str, value: object, kind: type[Any]) -> Any:
    """A command line gives a string, a configuration file a number."""
    try:
        return kind(str(value))
    except ValueError:
        raise UserError(f"{key} is {value!r}; it must be a number.") from None
