"""The ASGI application: the Open Inference Protocol, images, the page, metrics.

Source: Open Inference Protocol (KServe's "V2"), HTTP/REST; model repository extension (index).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mecdeploy import __version__
from mecdeploy.errors import UserError
from mecdeploy.prediction import ImageTooLarge
from mecdeploy.serving import protocol
from mecdeploy.serving.bodies import Body
from mecdeploy.serving.config import ServeConfig
from mecdeploy.serving.errors import Refusal
from mecdeploy.serving.images import image_of
from mecdeploy.serving.metrics import CONTENT_TYPE
from mecdeploy.serving.page import page
from mecdeploy.serving.service import Service, Serving

T = TypeVar("T")
CLIENT_LEFT = 499
_LONG = 65536
"""Bytes from which a body is taken apart in a thread."""
log = logging.getLogger(__name__)


def build_app(config: ServeConfig) -> Starlette:
    """The application, with every model loaded; raises UserError for one that cannot be served.

    Its `state.service` is the Service, whose `drain()` refuses new requests and lets accepted ones finish.
    """
    service = Service(config)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.ensure_future(service.watching()) if config.reload_seconds else None
        yield
        service.drain()
        if watching is not None:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        service.close()

    handlers = Handlers(service)
    model, version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
    routes = [
        Route("/", page),
        Route("/metrics", handlers.metrics),
        Route("/v2", handlers.server),
        Route("/v2/health/live", handlers.live),
        Route("/v2/health/ready", handlers.ready),
        Route("/v2/repository/index", handlers.index, methods=["POST"]),
        *(Route(address, handlers.metadata) for address in (model, version)),
        *(Route(f"{address}/ready", handlers.model_ready) for address in (model, version)),
        *(Route(f"{address}/infer", handlers.infer, methods=["POST"]) for address in (model, version)),
        Route("/v1/models", handlers.models),
        Route("/v1/models/{model}/classify", handlers.classify, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={Refusal: _refused, HTTPException: _no_such_address, Exception: _broken},
    )
    app.state.service = service
    return app


@dataclass(frozen=True)
class Handlers:
    """One method for each address."""

    service: Service

    async def server(self, request: Request) -> Response:
        """Server metadata."""
        return JSONResponse({"name": "mecdeploy", "version": __version__, "extensions": list(protocol.EXTENSIONS)})

    async def live(self, request: Request) -> Response:
        """The process answers."""
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """Every model is loaded before anything is answered, so only the end of the server is not ready."""
        return self._readiness()

    async def model_ready(self, request: Request) -> Response:
        """As `ready`, for a model that there is."""
        self._find(request)
        return self._readiness()

    async def metadata(self, request: Request) -> Response:
        """What a model reads and writes."""
        model = self._find(request).model
        return JSONResponse(
            {
                "name": model.name,
                "versions": [model.version],
                "platform": "onnxruntime_onnx",
                "inputs": [spec.to_json() for spec in model.inputs],
                "outputs": [spec.to_json() for spec in model.outputs],
            }
        )

    async def index(self, request: Request) -> Response:
        """Every model with its version and state."""
        return JSONResponse(
            [{"name": model.name, "version": model.version, "state": "READY"} for model in self.service.models]
        )

    async def models(self, request: Request) -> Response:
        """What the page offers: models that classify images."""
        return JSONResponse(
            {
                "models": [
                    {"name": model.name, "version": model.version, "classes": len(model.class_names)}
                    for model in self.service.models
                    if model.class_names
                ]
            }
        )

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self.service.metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    async def infer(self, request: Request) -> Response:
        """Tensors in, tensors out."""
        return await self._answer(request, "infer", self._infer)

    async def classify(self, request: Request) -> Response:
        """An image in, the likeliest classes out."""
        return await self._answer(request, "classify", self._classify)

    async def _infer(self, request: Request, serving: Serving, body: Body) -> Response:
        model, content = serving.model, await body.read()
        header_length = request.headers.get(protocol.HEADER_LENGTH)
        arguments = content, header_length, model.inputs, model.outputs
        parsed = (
            protocol.parse(*arguments)
            if len(content) < _LONG
            else await self.service.in_thread(protocol.parse, *arguments)
        )
        outputs = await _unless_gone(request, serving.infer(parsed.arrays))
        answer, headers = protocol.answer(parsed, model.name, model.version, outputs)
        return Response(answer, headers=headers)

    async def _classify(self, request: Request, serving: Serving, body: Body) -> Response:
        model = serving.model
        count = _count(request.query_params.get("top", "5"))
        image = await image_of(request, await body.read())
        try:
            arrays = await self.service.in_thread(self._decode, model, image)
        except ImageTooLarge as error:
            raise Refusal(413, str(error)) from None
        except UserError as error:
            raise Refusal(400, str(error)) from None
        outputs = await _unless_gone(request, serving.infer(arrays))
        (prediction,) = model.read_out(outputs)
        classes = [{"class": name, "probability": probability} for name, probability in prediction.top(count)]
        return JSONResponse({"model_name": model.name, "model_version": model.version, "classes": classes})

    def _decode(self, model: Any, image: bytes) -> Any:
        return model.decode(image, max_pixels=self.service.config.max_pixels)

    async def _answer(
        self,
        request: Request,
        endpoint: str,
        handle: Callable[[Request, Serving, Body], Awaitable[Response]],
    ) -> Response:
        """Admission, time limit, the count of what became of the request."""
        config = self.service.config
        began = time.perf_counter()
        body = Body(request, limit=config.max_body, seconds=config.body_timeout)
        known = ""  # no name that a client makes up becomes a label
        try:
            serving = self._find(request)
            known = serving.model.name
            with self.service.admit(known):
                async with asyncio.timeout(config.timeout):
                    response = await handle(request, serving, body)
        except Refusal as refusal:
            response = _refused(request, refusal)
        except TimeoutError:
            response = _refused(request, Refusal(504, f"no answer within {config.timeout:g} seconds."))
        except ClientDisconnect:
            response = Response(status_code=CLIENT_LEFT)
        except Exception as error:
            response = _broken(request, error)
        if not await body.discard():
            response.headers["connection"] = "close"
        self.service.metrics.requests.labels(known, endpoint, str(response.status_code)).inc()
        self.service.metrics.seconds.labels(known, endpoint).observe(time.perf_counter() - began)
        return response

    def _find(self, request: Request) -> Serving:
        return self.service.find(request.path_params["model"], request.path_params.get("version"))

    def _readiness(self) -> Response:
        ready = not self.service.draining
        return JSONResponse({"ready": ready}, status_code=200 if ready else 503)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; ClientDisconnect, and no more work, if the client leaves first."""
    answer = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return await answer
    finally:
        answer.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _count(value: str) -> int:
    if not (value.isascii() and value.isdigit() and 1 <= len(value) <= 6 and int(value) >= 1):
        raise Refusal(400, f"top is {value[:40]!r}; it must be a number of at least 1.")
    return int(value)


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    headers = {"retry-after": str(error.retry_after)} if error.retry_after is not None else None
    return JSONResponse({"error": str(error)}, status_code=error.status, headers=headers)


def _no_such_address(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}; docs/serving.md lists the addresses."
    return JSONResponse({"error": message}, status_code=error.status_code, headers=error.headers)


def _broken(request: Request, error: Exception) -> Response:
    """A bug, or a model that fails on some input: the trace is for the log, its number for the client."""
    number = secrets.token_hex(8)
    log.error("request %s failed", number, exc_info=error)
    return JSONResponse({"error": f"internal error; the server's log has it as request {number}."}, status_code=500)
