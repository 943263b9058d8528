"""Errors as OpenAI's interface has them: `{"error": {"message", "type", "param", "code"}}`.

A message is one sentence for the client. Nothing of the server's inside goes out: paths are cut
from messages, and of an error that no client can cause only the log has the traceback.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ddit_rt.errors import CaptureError, RunCancelled, StallError

LOG = logging.getLogger("ddit_rt.serving")


class _Unheard(logging.Handler):
    """Lets stderr have the warnings and errors of a server for which nobody set up logging.

    Python would do so itself, but for the `NullHandler` that keeps the library quiet.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        handlers = [*LOG.handlers, *logging.getLogger("ddit_rt").handlers, *logging.root.handlers]
        heard = any(not isinstance(one, (_Unheard, logging.NullHandler)) for one in handlers)
        if not heard and logging.lastResort is not None:
            logging.lastResort.handle(record)


LOG.addHandler(_Unheard(logging.WARNING))

_PATH = re.compile(r"(?<![\w.:/])~?(?:/[\w.@+~=-]+){2,}/?")
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_LONGEST = 600


class ApiError(Exception):
    """An answer that is no result."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        entry = {"message": clean(str(self)), "type": kind, "param": self.param, "code": self.code}
        return {"error": entry}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = None if self.headers is None else dict(self.headers)
        return JSONResponse(self.body(), self.status, headers=headers)


def queue_full(waiting: int, seconds: float) -> ApiError:
    """More is asked for than may wait."""
    return ApiError(
        429,
        f"{waiting} images wait already; ask again later",
        code="queue_full",
        headers={"Retry-After": str(max(1, round(seconds)))},
    )


def too_late(seconds: float) -> ApiError:
    """The deadline of a request is over."""
    return ApiError(
        503,
        f"no result within {seconds:g} s; ask again later",
        code="deadline",
        headers={"Retry-After": "5"},
    )


def stopping() -> ApiError:
    """The server takes no more requests, or ended one of those that it had."""
    return ApiError(
        503,
        "the server is stopping; ask again later",
        code="stopping",
        headers={"Retry-After": "5"},
    )


def not_ready() -> ApiError:
    """The engine has not run yet, or cannot run any more."""
    return ApiError(503, "the model is not ready", code="not_ready", headers={"Retry-After": "5"})


def clean(message: str) -> str:
    """A message on one line, without paths and not endless."""
    text = _PATH.sub("<path>", " ".join(message.split()))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an error of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RunCancelled):
        return stopping()
    if isinstance(error, StallError):
        return not_ready()
    if isinstance(error, (torch.OutOfMemoryError, CaptureError)):
        return ApiError(503, "out of memory; ask for a smaller image", code="out_of_memory")
    if isinstance(error, ValueError):
        return ApiError(400, str(error), code="invalid_value")
    LOG.error("a request failed", exc_info=error)
    return ApiError(500, "internal error", code="internal_error")


def misread(errors: Iterable[Any]) -> ApiError:
    """What a client is told of a request that is none, of pydantic's errors."""
    # Of a field of several types, the deepest is of the type that came closest.
    first = max(errors, key=lambda one: len(one["loc"]))
    place = [str(part) for part in first["loc"] if part not in ("body", "path", "query")]
    param = ".".join(place) or None
    told = f"{param}: {first['msg']}" if param else f"the body: {first['msg']}"
    return ApiError(400, told, param=param, code=str(first["type"]))


def install(app: FastAPI) -> None:
    """Lets an application answer every error so."""

    @app.exception_handler(ApiError)
    async def _api(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return misread(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        code = "not_found" if error.status_code == 404 else None
        headers = error.headers
        return ApiError(error.status_code, str(error.detail), code=code, headers=headers).response()

    @app.exception_handler(Exception)
    async def _unforeseen(_: Request, error: Exception) -> JSONResponse:
        del error  # uvicorn logs it
        return ApiError(500, "internal error", code="internal_error").response()
