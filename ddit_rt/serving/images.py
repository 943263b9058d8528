"""`POST /v1/images/generations`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ddit_rt.serving.answer import images_answer, result
from ddit_rt.serving.schema import Generation

router = APIRouter()


@router.post("/v1/images/generations")
async def generate(asked: Generation, request: Request) -> Response:
    """Makes pictures of a prompt."""
    service: Any = request.app.state.service
    work = service.read(asked, asked.n)
    job = service.worker.submit(work)
    made = await result(job, request, service.worker, service.config.deadline_seconds)
    return JSONResponse(await images_answer(made, asked))
