"""Server-sent events of an image: its steps with previews, then the image."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from PIL import Image

from ddit_rt.engine.watch import StepView
from ddit_rt.serving.answer import disconnected, encode, entry
from ddit_rt.serving.errors import as_api_error, too_late
from ddit_rt.serving.jobs import Job
from ddit_rt.serving.preview import Previews
from ddit_rt.serving.schema import Generation
from ddit_rt.serving.worker import Worker


class Stream:
    """The events of one request; `on_step` is called in the worker's thread."""

    def __init__(self, asked: Generation, worker: Worker) -> None:
        self._asked = asked
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[StepView, Image.Image] | None] = asyncio.Queue()
        self._previews = Previews()

    def on_step(self, view: StepView, place: int) -> None:
        """Makes a preview, and queues it where one is asked for."""
        preview = self._previews(self._worker.latent_to_rgb, view, place)
        if _wanted(view.step, view.steps, self._asked.partial_images):
            self._loop.call_soon_threadsafe(self._events.put_nowait, (view, preview))

    def response(self, job: Job, request: Request) -> StreamingResponse:
        """The answer, which begins at once."""
        job.done.add_done_callback(
            lambda _: self._loop.call_soon_threadsafe(self._events.put_nowait, None)
        )
        return StreamingResponse(
            self._lines(job, request),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    async def _lines(self, job: Job, request: Request) -> AsyncIterator[str]:
        gone = asyncio.ensure_future(self._drop_when_gone(job, request))
        index = 0
        try:
            while (event := await self._next(job)) is not None:
                yield _line("image_generation.partial_image", await self._partial(event, index))
                index += 1
            yield _line("image_generation.completed", await self._completed(job))
        except Exception as error:  # noqa: BLE001 - the status has been sent; this tells the client
            yield _line("error", as_api_error(error).body())
        finally:
            gone.cancel()
            if not job.done.done():
                self._worker.drop(job, "deadline" if job.expired else "disconnect")

    async def _next(self, job: Job) -> Any:
        try:
            return await asyncio.wait_for(self._events.get(), job.left)
        except asyncio.TimeoutError as error:
            raise too_late(job.seconds) from error

    async def _drop_when_gone(self, job: Job, request: Request) -> None:
        await disconnected(request)
        self._worker.drop(job, "disconnect")

    async def _partial(self, event: tuple[StepView, Image.Image], index: int) -> dict[str, Any]:
        view, preview = event
        return {
            **self._common(f"{preview.width}x{preview.height}", "png"),
            "b64_json": await asyncio.to_thread(encode, preview, "png"),
            "partial_image_index": index,
            "step": view.step,
            "steps": view.steps,
            "patch_size": view.patch_size,
            "reused": view.reused,
        }

    async def _completed(self, job: Job) -> dict[str, Any]:
        (made,) = job.done.result()
        width, height = made.picture.size
        common = self._common(f"{width}x{height}", self._asked.output_format)
        return {**common, **await entry(made, self._asked)}

    def _common(self, size: str, output_format: str) -> dict[str, Any]:
        return {
            "created_at": int(time.time()),
            "size": size,
            "output_format": output_format,
            "quality": "auto",
            "background": "opaque",
        }


def _line(kind: str, data: dict[str, Any]) -> str:
    body = data if kind == "error" else {"type": kind, **data}
    return f"event: {kind}\ndata: {json.dumps(body)}\n\n"


def _wanted(step: int, steps: int, previews: int | None) -> bool:
    """Whether a step is one of `previews`, spread evenly; by default every one is."""
    if previews is None:
        return True
    return step in {(place + 1) * steps // (previews + 1) for place in range(previews)}
