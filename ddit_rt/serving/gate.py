"""What stands before every request: API key, size of the body, and the count of the answers."""

from __future__ import annotations

import hmac
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddit_rt import telemetry
from ddit_rt.serving.errors import LOG, ApiError
from ddit_rt.serving.metrics import Metrics

OPEN = ("/health", "/ready", "/metrics")
"""Paths that need no key: an orchestrator's."""


def _span(scope: Scope) -> AbstractContextManager[telemetry.Span]:
    """Of a request, in the trace that its `traceparent` names.

    None for an orchestrator's, nor where FastAPI or an instrumentation of it has made one already.
    """
    if scope["path"] in OPEN or telemetry.inside():
        return nullcontext(telemetry.Span())
    return telemetry.span(
        scope["method"],
        {"http.request.method": scope["method"], "url.path": scope["path"]},
        parent=telemetry.incoming(scope["headers"]),
        server=True,
    )


class Gate:
    """An ASGI middleware."""

    def __init__(
        self, app: ASGIApp, *, keys: Sequence[str], body: int, metrics: Metrics | None
    ) -> None:
        """Stands before an application.

        Args:
            app: The application.
            keys: API keys; empty: none is asked for.
            body: The most bytes of a body.
            metrics: Where answers are counted; None: elsewhere.
        """
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._body = body
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with _span(scope) as span:
            await self._answer(scope, receive, send, span)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, span: telemetry.Span
    ) -> None:
        started, status = time.monotonic(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            error = self._refusal(scope)
            if error is not None:
                await error.response()(scope, receive, counted)
            else:
                await self._app(scope, self._limited(receive), counted)
        finally:
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", None)
            endpoint = route or "none"
            LOG.debug("%s %s: %d after %.3f s", scope["method"], endpoint, status, seconds)
            span.set({"http.response.status_code": status})
            if route is not None:
                span.rename(f"{scope['method']} {route}")
                span.set({"http.route": route})
            if status >= 500:
                span.fail(f"answered with {status}")
            if self._metrics is not None:
                self._metrics.requests.labels(endpoint, str(status)).inc()
                self._metrics.request_seconds.labels(endpoint).observe(seconds)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if scope["path"] not in OPEN and not self._known(headers.get("authorization", "")):
            return ApiError(
                401,
                "no valid API key; send one as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._body:
            return self._too_large()
        return None

    def _known(self, header: str) -> bool:
        """Whether a header carries a key; it takes as long whichever it is, and if it is none."""
        scheme, _, key = header.partition(" ")
        given = key.strip().encode("utf-8", "replace")
        found = [hmac.compare_digest(given, known) for known in self._keys]
        return not self._keys or (any(found) and scheme.lower() == "bearer")

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._body} bytes", code="body_too_large")

    def _limited(self, receive: Receive) -> Receive:
        """Counts a body that does not say its length, or lies."""
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._body:
                raise HTTPException(413, str(self._too_large()))
            return message

        return limited
