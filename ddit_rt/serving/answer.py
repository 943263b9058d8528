"""Waiting for a job, and what its images become in an answer."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from typing import Any

from fastapi import Request

from ddit_rt.serving.errors import ApiError, as_api_error, too_late
from ddit_rt.serving.jobs import Job, Made
from ddit_rt.serving.schema import Picture
from ddit_rt.serving.worker import Worker

GONE = 499
"""Status, by custom, of a request whose client did not wait; nobody reads it."""


def awaited(job: Job) -> asyncio.Future[list[Made]]:
    """A job's images, for the event loop."""
    done = asyncio.wrap_future(job.done)
    # So that an error that nobody waits for is not reported as one that nobody saw.
    done.add_done_callback(lambda one: one.cancelled() or one.exception())
    return done


async def result(job: Job, request: Request, worker: Worker) -> list[Made]:
    """A job's images.

    Args:
        job: The job.
        request: The job's request, whose body was read.
        worker: The worker that has the job.

    Raises:
        ApiError: It failed, took too long, or the client is gone: then its run ends, too.
    """
    done = awaited(job)
    try:
        gone = await leaves(request, done, job.left)
    except asyncio.CancelledError:
        worker.drop(job, "stop")
        raise
    if not done.done():
        worker.drop(job, "disconnect" if gone else "deadline")
        raise ApiError(GONE, "the client is gone") if gone else too_late(job.seconds)
    error = done.exception()
    if error is not None:
        raise as_api_error(error) from error
    return done.result()


async def leaves(request: Request, done: asyncio.Future[Any], seconds: float) -> bool:
    """Waits for a future, at most for a time; returns whether the client of a request is gone."""
    gone = asyncio.ensure_future(disconnected(request))
    both: set[asyncio.Future[Any]] = {done, gone}
    try:
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return gone.done()
    finally:
        gone.cancel()


async def disconnected(request: Request) -> None:
    """Returns once the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def images_answer(made: list[Made], asked: Picture) -> dict[str, Any]:
    """OpenAI's answer for images."""
    data = [await entry(one, asked) for one in made]
    width, height = made[0].picture.size
    return {
        "created": int(time.time()),
        "data": data,
        "size": f"{width}x{height}",
        "output_format": asked.output_format,
    }


async def entry(made: Made, asked: Picture) -> dict[str, Any]:
    """One image of an answer."""
    encoded = await asyncio.to_thread(encode, made.picture, asked.output_format)
    found: dict[str, Any] = {"b64_json": encoded, "seed": made.seed}
    if asked.return_trace:
        found["trace"] = made.trace.to_dict()
    return found


def encode(picture: Any, output_format: str) -> str:
    """A `PIL.Image` as base64 of a file."""
    file = io.BytesIO()
    options = {"compress_level": 1} if output_format == "png" else {}
    picture.save(file, output_format.upper(), **options)
    return base64.b64encode(file.getvalue()).decode("ascii")
