"""`mecdeploy serve`: parses, and runs a server until a signal ends it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import click

from mecdeploy.errors import UserError


@click.command(short_help="Serve models over HTTP.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--host", metavar="ADDRESS", help="Default: 127.0.0.1, this machine only.")
@click.option("--port", type=int, help="Default: 8000; 0: any free one.")
@click.option("--workers", type=int, metavar="N", help="Processes. Default: 1.")
@click.option("--threads", type=int, metavar="N", help="Of onnxruntime, for each model. Default: cores / workers.")
@click.option("--max-batch", type=int, metavar="ROWS", help="That are run together. Default: 32.")
@click.option("--max-delay-ms", type=float, metavar="MS", help="That a request waits for others. Default: 0.")
@click.option("--max-queue", type=int, metavar="N", help="Requests in hand per model, before 429. Default: 256.")
@click.option("--timeout", type=float, metavar="SECONDS", help="From headers to answer. Default: 30.")
@click.option("--body-timeout", type=float, metavar="SECONDS", help="Of those, for the body. Default: 10.")
@click.option("--max-body-mb", type=float, metavar="MB", help="Largest body. Default: 16.")
@click.option("--max-megapixels", type=float, metavar="MP", help="Largest image that is decoded. Default: 50.")
@click.option("--reload-seconds", type=float, metavar="SECONDS", help="Between looks for a new version. Default: 2.")
@click.option("--drain-seconds", type=float, metavar="SECONDS", help="To finish requests at the end. Default: 30.")
def serve(models: tuple[str, ...], **limits: Any) -> None:
    """Serve each MODEL: the Open Inference Protocol, images, a page, metrics.

    MODEL is a file, a run folder, a folder of versions (1/model.onnx, 2/model.onnx, ...) or a folder of such folders,
    with NAME= before it if it is to have another name.
    """
    missing = [package for package in ("starlette", "uvicorn", "prometheus_client") if find_spec(package) is None]
    if missing:
        raise UserError(f"{missing[0]} is not installed; install mecdeploy[serve].")
    from mecdeploy.serving.config import ServeConfig

    config = ServeConfig(models=models, **{name: value for name, value in limits.items() if value is not None})
    from mecdeploy.serving.server import run

    run(config)
