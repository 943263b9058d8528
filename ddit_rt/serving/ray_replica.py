"""One engine behind its HTTP application, as a replica of Ray Serve."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import Metric

from ddit_rt.engine import Engine
from ddit_rt.serving.app import create_app
from ddit_rt.serving.aside import aside
from ddit_rt.serving.config import ServeConfig
from ddit_rt.serving.requests import DRAWN

_LOOK = 0.1
"""Seconds between two looks at a video that is being made, or at an engine that starts."""

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """An HTTP request on its way to a replica.

    Attributes:
        scope: The plain data of its ASGI scope.
        body: The whole body.
        seed: The seed that it gets if it names none, so that it is the same request at any replica.
    """

    scope: dict[str, Any]
    body: bytes
    seed: int


class Replica:
    """The application of `create_app`, called from another process.

    Whatever it has not finished is lost if it dies, and the caller has to call another.
    """

    def __init__(self, load: Callable[[], Engine], config: ServeConfig) -> None:
        """Loads the engine, and returns once it has run.

        Args:
            load: Makes the engine; called in this process.
            config: What the operator sets.

        Raises:
            RuntimeError: The engine cannot run; the log says why.
        """
        self._app = create_app(aside(load), config)
        service = self._app.state.service
        self._videos = service.videos
        self._worker = service.worker
        self._running: set[asyncio.Task[None]] = set()
        self._worker.start()
        while not self._worker.ready:
            self.check_health()
            time.sleep(_LOOK)

    def check_health(self) -> None:
        """Called by Ray, which replaces this replica if it raises.

        Raises:
            RuntimeError: The engine cannot go on.
        """
        if self._worker.broken:
            raise RuntimeError("the engine cannot go on")

    async def is_ready(self) -> bool:
        """Whether requests are served at once."""
        return bool(self._worker.ready)

    async def metrics(self) -> tuple[str, list[Metric]]:
        """This replica's name, and all that it has counted."""
        return f"{socket.gethostname()}:{os.getpid()}", [*self._worker.metrics.registry.collect()]

    async def answer(self, call: Call) -> AsyncIterator[Message]:
        """Answers a request; if the caller cancels, the client counts as gone.

        Yields:
            The ASGI messages of the answer.
        """
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        given = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Message:
            if given:
                return given.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            messages.put_nowait(dict(message))

        async def run() -> None:
            DRAWN.set(call.seed)  # in this task's context
            try:
                await self._app(call.scope, receive, send)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(run())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            while (message := await messages.get()) is not None:
                self._end_if_broken()
                yield message
        finally:
            gone.set()

    async def video(self, call: Call) -> AsyncIterator[Message]:
        """Makes a video; if the caller cancels, its run ends.

        Yields:
            `{"status", "body"}` of the answer where the request is refused. Otherwise `{"entry"}`
            whenever what `GET /v1/videos/{id}` tells has changed, and at last `{"entry", "file"}`.
        """
        start, *rest = [message async for message in self.answer(call)]
        body = b"".join(message["body"] for message in rest)
        if start["status"] != 200:
            yield {"status": start["status"], "body": body}
            return
        record = self._videos.find(json.loads(body)["id"])
        entry = record.entry
        try:
            yield {"entry": entry}
            while not record.over:
                await asyncio.sleep(_LOOK)
                self._end_if_broken()
                if record.entry is not entry:
                    entry = record.entry
                    yield {"entry": entry}
            yield {"entry": record.entry, "file": record.file}
        finally:
            self._videos.delete(record)

    def _end_if_broken(self) -> None:
        """Ends this process, so that all callers learn at once that they have to call another."""
        if self._worker.broken:
            os._exit(1)
