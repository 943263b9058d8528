"""`POST /v1/images/generations`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ddit_rt.serving.answer import images_answer, result
from ddit_rt.serving.errors import ApiError
from ddit_rt.serving.schema import Generation
from ddit_rt.serving.stream import Stream

router = APIRouter()


@router.post("/v1/images/generations")
async def generate(asked: Generation, request: Request) -> Response:
    """Makes pictures of a prompt."""
    service: Any = request.app.state.service
    if asked.stream:
        return stream_picture(service, asked, request)
    if asked.partial_images is not None:
        raise ApiError(
            400,
            "partial_images belong to a stream; ask for one with stream",
            param="partial_images",
        )
    work = service.read(asked, asked.n)
    job = service.worker.submit(work)
    made = await result(job, request, service.worker, service.config.deadline_seconds)
    return JSONResponse(await images_answer(made, asked))


def stream_picture(service: Any, asked: Generation, request: Request) -> Response:
    """The same as events."""
    if asked.n != 1:
        raise ApiError(400, "a stream is of one picture; leave n out", param="n")
    stream = Stream(asked, service.worker, service.config.deadline_seconds)
    work = service.read(asked, on_step=stream.on_step)
    return stream.response(service.worker.submit(work), request)
