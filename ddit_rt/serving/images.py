"""`POST /v1/images/generations`, and `/v1/images/edits` of a model that edits."""

from __future__ import annotations

from asyncio import to_thread
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ddit_rt.serving.answer import images_answer, result
from ddit_rt.serving.errors import ApiError
from ddit_rt.serving.forms import described, read_body
from ddit_rt.serving.jobs import Work
from ddit_rt.serving.schema import Edit, Generation, Picture
from ddit_rt.serving.stream import Stream
from ddit_rt.serving.uploads import read_picture
from ddit_rt.serving.worker import Worker

router = APIRouter()
edit_router = APIRouter()


@router.post("/v1/images/generations")
async def generate(asked: Generation, request: Request) -> Response:
    """Makes images of a prompt."""
    service: Any = request.app.state.service
    if not asked.stream:
        if asked.partial_images is not None:
            told = "partial_images belong to a stream; ask for one with stream"
            raise ApiError(400, told, param="partial_images")
        return await _answer(asked, service.read(asked, asked.n), request)
    if asked.n != 1:
        raise ApiError(400, "a stream is of one image; leave n out", param="n")
    stream = Stream(asked, service.worker)
    work = service.read(asked, on_step=stream.on_step)
    return stream.response(service.worker.submit(work), request)


async def _answer(asked: Picture, work: Work, request: Request) -> Response:
    worker: Worker = request.app.state.service.worker
    made = await result(worker.submit(work), request, worker)
    return JSONResponse(await images_answer(made, asked))


@edit_router.post(
    "/v1/images/edits",
    openapi_extra=described(Edit, {"image": True, "mask": False}, as_json=False),
)
async def edit(request: Request) -> Response:
    """Makes images of an uploaded one."""
    service: Any = request.app.state.service
    asked, files = await read_body(request, Edit)
    if unknown := sorted(files.keys() - {"image", "mask"}):
        raise ApiError(400, f"got the upload {unknown[0]}; expected image", param=unknown[0])
    if "image" not in files:
        raise ApiError(400, "no image came; upload one as image", param="image")
    pixels = service.config.limits.upload_pixels
    image = await to_thread(read_picture, files["image"], "image", pixels)
    given: dict[str, Any] = {"image": image.convert("RGB")}
    if "mask" in files:
        given["mask_image"] = await to_thread(read_picture, files["mask"], "mask", pixels)
    if asked.strength is not None:
        given["strength"] = asked.strength
    return await _answer(asked, service.read(asked, asked.n, alone=True, **given), request)
