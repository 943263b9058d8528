"""The deployment in front of the replicas.

It checks keys and sizes, draws a seed for every request and sends it to a replica. If the replica
dies, another one gets the same request, and makes the same image since the seed is the same.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import Metric, generate_latest
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send

from ddit_rt import telemetry
from ddit_rt.serving import errors, videos
from ddit_rt.serving.answer import leaves
from ddit_rt.serving.app import add_models
from ddit_rt.serving.config import ServeConfig
from ddit_rt.serving.errors import ApiError
from ddit_rt.serving.gate import Gate
from ddit_rt.serving.ray_calls import Calls
from ddit_rt.serving.ray_replica import Call, Message

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_ASKING = 10.0
"""Seconds that replicas have to report readiness or metrics."""

_TRAVELS = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string"),
    *("root_path", "headers", "client", "server"),
)
"""Keys of an ASGI scope whose values are plain data."""


class Front:
    """The deployment that Ray Serve's proxies know."""

    def __init__(self, replicas: Any, config: ServeConfig) -> None:
        """Takes the replicas.

        Args:
            replicas: Handle of their deployment.
            config: What the operator sets.
        """
        self._app = front_app(replicas.options(stream=True), config)

    async def __call__(self, request: Request) -> Response:
        """Answers any request."""
        del request  # the response is called with the request's own scope
        return _Application(self._app)


def front_app(replicas: Any, config: ServeConfig) -> FastAPI:
    """The application of `Front`.

    Args:
        replicas: Handle of the replicas' deployment, with the option `stream`.
        config: What the operator sets.
    """
    calls = Calls(replicas, config)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = SimpleNamespace(videos=videos.Videos(config))
    errors.install(app)
    app.add_middleware(Gate, keys=config.keys, body=config.limits.body, metrics=None)
    add_models(app, config.model)
    _add_operations(app, calls)
    _add_videos(app, calls)

    @app.api_route("/{path:path}", methods=_METHODS)
    async def hand_on(request: Request) -> Response:
        """Sends everything else to a replica."""
        return _HandedOn(calls, await _call(request), config.deadline_seconds)

    return app


def _add_operations(app: FastAPI, calls: Calls) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether this process can go on; Ray checks the replicas."""
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether a replica can serve a request at once."""
        if not any(await calls.everywhere("is_ready", _ASKING)):
            raise errors.not_ready()
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """The metrics of all replicas, which differ in the label `replica`."""
        page = merged(await calls.everywhere("metrics", _ASKING))
        return Response(page, media_type="text/plain; version=0.0.4")


def _add_videos(app: FastAPI, calls: Calls) -> None:
    @app.post("/v1/videos")
    async def create(request: Request) -> Response:
        """Queues a video at a replica."""
        events = _made(calls, await _call(request))
        first = await anext(events)
        if "entry" not in first:
            await events.aclose()
            return Response(first["body"], first["status"], media_type="application/json")
        return JSONResponse(app.state.service.videos.add(first, events).entry)

    app.include_router(videos.router)


async def _made(calls: Calls, call: Call) -> AsyncGenerator[Message, None]:
    """What replicas tell of a video: first whether one takes it; see `Replica.video`."""
    accepted = False
    async with aclosing(calls("video", call)) as messages:
        async for _, message in messages:
            if accepted and "entry" not in message:
                told = "the video's replica died, and no other takes it"
                raise ApiError(503, told, code="replica_died")
            accepted = True
            yield message


def merged(pages: Iterable[tuple[str, list[Metric]]]) -> bytes:
    """One page of Prometheus's text format for several replicas.

    Args:
        pages: Name and metrics of each replica.
    """
    families: dict[str, Metric] = {}
    for replica, metrics in pages:
        for one in metrics:
            family = families.setdefault(one.name, Metric(one.name, one.documentation, one.type))
            family.samples += [
                sample._replace(labels={**sample.labels, "replica": replica})
                for sample in one.samples
            ]
    return generate_latest(_Collected(list(families.values())))


class _Collected(Collector):
    """Metrics that were collected in other processes."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


async def _call(request: Request) -> Call:
    """A request as it is sent to a replica, with a seed in case that it names none."""
    scope = {name: request.scope[name] for name in _TRAVELS if name in request.scope}
    scope["headers"] = telemetry.outgoing(scope["headers"])
    return Call(scope=scope, body=await request.body(), seed=secrets.randbelow(2**31))


class _Application(Response):
    """A response that an ASGI application sends."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class _HandedOn(Response):
    """The answer of a replica, or of the next one if it dies; ends early if the client leaves."""

    def __init__(self, calls: Calls, call: Call, seconds: float) -> None:
        super().__init__()
        self._calls = calls
        self._call = call
        self._seconds = seconds
        self._sent = 0
        self._status = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        passing = asyncio.ensure_future(self._pass_on(send))
        try:
            gone = await leaves(Request(scope, receive), passing, self._seconds)
            error: BaseException | None = errors.too_late(self._seconds)
            if passing.done():
                error = passing.exception()
            else:
                passing.cancel()
                await asyncio.wait({passing})
            if error is not None and not gone:
                await self._tell(errors.as_api_error(error), scope, receive, send)
        finally:
            passing.cancel()

    async def _pass_on(self, send: Send) -> None:
        """Sends the messages of the answer, each of them once however many replicas it takes."""
        async with aclosing(self._calls("answer", self._call)) as messages:
            async for place, message in messages:
                if place == 0 and self._sent and message["status"] != self._status:
                    raise ApiError(503, "the replica died, and no other answers it", code="broken")
                if place == 0:
                    self._status = message["status"]
                if place == self._sent:
                    await send(message)
                    self._sent += 1

    async def _tell(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._sent:
            await error.response()(scope, receive, send)
            return
        line = f"event: error\ndata: {json.dumps(error.body())}\n\n"  # only streams send early
        await send({"type": "http.response.body", "body": line.encode(), "more_body": False})
