"""The process, or several, around the application: address, signals, log."""

from __future__ import annotations

import asyncio
import logging.config
import math
import os
import signal
import socket
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from mecdeploy.errors import UserError
from mecdeploy.serving.app import build_app
from mecdeploy.serving.config import ServeConfig
from mecdeploy.serving.connection import H11WithTimeout
from mecdeploy.serving.metrics import FOLDER
from mecdeploy.serving.service import Service

_KEEP_ALIVE = 75
"""Seconds; more than load balancers keep an idle connection, so that it is not closed with a request on its way."""
_ENDS = (signal.SIGTERM, signal.SIGINT)
_CONNECTIONS_PER_REQUEST = 4
_LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}},
    "loggers": {
        "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
        "mecdeploy.serving": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
    },
}
log = logging.getLogger(__name__)


def run(config: ServeConfig) -> None:
    """Serve until a signal ends it, then finish what was accepted. Raises UserError before it listens, or never."""
    with _bind(config.host, config.port) as listener:
        app = build_app(config)  # with several workers, too: what cannot be served is refused once, and here
        _say_what_is_served(config, app.state.service, listener)
        if config.workers == 1:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for number in _ENDS:
                signal.signal(number, _be_done)
            uvicorn.Server(_settings(config, partial(_told_of_the_end, app))).run([listener])
            return
        del app
        with tempfile.TemporaryDirectory(prefix="mecdeploy-metrics-") as folder:
            os.environ[FOLDER] = folder
            workers = Multiprocess(_settings(config, partial(_worker, config)), [listener])
            workers.run()
        if any(process.exitcode == STARTUP_FAILURE for process in workers.processes):
            raise UserError("a worker could not start; the lines above say why.")


def _worker(config: ServeConfig) -> Starlette:
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    app = _told_of_the_end(build_app(config))
    log.info("worker %d serves", os.getpid())
    return app


def _told_of_the_end(app: Starlette) -> Starlette:
    """Refuse new requests from the signal on; uvicorn, whose handlers are in place by now, does the rest."""

    def drain(number: int, frame: FrameType | None, before: Any) -> None:
        loop.call_soon_threadsafe(app.state.service.drain)
        before(number, frame)

    loop = asyncio.get_running_loop()
    for number in _ENDS:
        signal.signal(number, partial(drain, before=signal.getsignal(number)))
    return app


def _be_done(number: int, frame: FrameType | None) -> None:
    """What a signal does that uvicorn raises again once all is answered: nothing, so that the exit code is 0."""


def _settings(config: ServeConfig, factory: Callable[[], Starlette]) -> uvicorn.Config:
    return uvicorn.Config(
        factory,
        factory=True,
        http=H11WithTimeout,  # and not httptools, which takes headers of any length
        ws="none",
        lifespan="on",
        log_config=_LOGGING,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        workers=config.workers,
        limit_concurrency=_CONNECTIONS_PER_REQUEST * config.max_queue,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(config.drain_seconds),
    )


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"host {host!r} is no address of this machine ({error.strerror}).") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(f"{host} port {port} cannot be listened on ({error.strerror}); try another --port.") from None
    listener.set_inheritable(True)
    return listener


def _say_what_is_served(config: ServeConfig, service: Service, listener: socket.socket) -> None:
    logging.config.dictConfig(_LOGGING)
    host, port = listener.getsockname()[:2]
    models = ",".join(f"{model.name}@{model.version}" for model in service.models)
    log.info(
        "serving address=http://%s:%d models=%s workers=%d threads=%d",
        f"[{host}]" if ":" in host else host,
        port,
        models,
        config.workers,
        config.threads_per_model,
    )
