"""`/v1/videos`: jobs that are asked for, looked up, fetched, cancelled and deleted."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ddit_rt.lab.measure.video_file import write_mp4
from ddit_rt.serving.answer import awaited
from ddit_rt.serving.config import ServeConfig
from ddit_rt.serving.errors import ApiError, as_api_error
from ddit_rt.serving.forms import described, read_body
from ddit_rt.serving.jobs import Work
from ddit_rt.serving.schema import Video
from ddit_rt.serving.uploads import read_picture
from ddit_rt.serving.worker import Worker

router = APIRouter()
_PICTURE = "input_reference"
_MOST = 1000
"""Videos that are remembered."""

_LOOK = 0.1
"""Seconds between two looks at a video that is being made."""

Event = dict[str, Any]
"""See `making`."""


class Record:
    """A video that was accepted.

    Attributes:
        entry: What OpenAI's clients read of it.
        file: The MP4, once it is completed.
        task: Who follows it to its end.
    """

    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry
        self.file = b""
        self.task: asyncio.Task[None] | None = None

    @property
    def over(self) -> bool:
        """Whether nothing will change any more."""
        return self.entry["status"] in ("completed", "failed")

    def fail(self, error: ApiError) -> None:
        """Notes that it is not made."""
        told = {"code": error.code, "message": error.body()["error"]["message"]}
        self.entry = {**self.entry, "status": "failed", "error": told}


class Videos:
    """The videos that a server can be asked for; used in its event loop alone."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._records: OrderedDict[str, Record] = OrderedDict()

    def add(self, first: Event, events: AsyncGenerator[Event, None]) -> Record:
        """Remembers a video, and follows the events that come after its first.

        Args:
            first: As `making` yields it.
            events: Closed, once the video is cancelled.
        """
        record = Record(first["entry"])
        self._records[record.entry["id"]] = record
        record.task = asyncio.get_running_loop().create_task(self._follow(record, events))
        return record

    def find(self, name: str) -> Record:
        """Finds a video by its identifier."""
        if name not in self._records:
            raise ApiError(404, "no such video", param="video_id", code="video_not_found")
        return self._records[name]

    def newest(self) -> list[Record]:
        """All videos, newest first."""
        return list(reversed(self._records.values()))

    def cancel(self, record: Record) -> None:
        """Ends one that is not done."""
        if not record.over and record.task is not None:
            record.fail(ApiError(400, "cancelled by the client", code="cancelled"))
            record.task.cancel()

    def delete(self, record: Record) -> None:
        """Ends it if need be, and forgets it."""
        self.cancel(record)
        self._records.pop(record.entry["id"], None)

    async def _follow(self, record: Record, events: AsyncGenerator[Event, None]) -> None:
        # Where a replica of Ray's took it from another, it begins anew under a name of its own.
        own = {name: record.entry[name] for name in ("id", "created_at")}
        try:
            async with aclosing(events):
                async for event in events:
                    record.entry = {**event["entry"], **own}
                    record.file = event.get("file", b"")
        except Exception as error:  # noqa: BLE001 - of whatever kind, it is the video's
            record.fail(as_api_error(error))
        finally:
            self._make_room()

    def _make_room(self) -> None:
        """Forgets the oldest that are done, as long as there are too many, or too many bytes."""
        for name, record in list(self._records.items()):
            held = sum(len(one.file) for one in self._records.values())
            if held <= self._config.video_bytes and len(self._records) <= _MOST:
                return
            if record.over:
                del self._records[name]


async def making(
    worker: Worker, work: Work, asked: Video, config: ServeConfig
) -> AsyncGenerator[Event, None]:
    """Has a video made; closing it before its end ends the run.

    Yields:
        `{"entry"}` whenever what clients read of it has changed, at last with the MP4: `"file"`.

    Raises:
        ApiError: It is refused.
        Exception: It cannot be made.
    """
    job = worker.submit(work, float("inf"))
    done = awaited(job)
    entry = {
        "id": f"video_{secrets.token_hex(12)}",
        "object": "video",
        "model": config.model,
        "status": "queued",
        "progress": 0,
        "created_at": int(time.time()),
        "completed_at": None,
        "prompt": asked.prompt,
        "size": asked.size or "auto",
        "seconds": None if asked.seconds is None else f"{asked.seconds:g}",
        "error": None,
        "seed": work.seeds[0],
    }
    try:
        yield {"entry": entry}
        while not (await asyncio.wait({done}, timeout=_LOOK))[0]:
            if job.started and entry["status"] == "queued":
                entry = {**entry, "status": "in_progress"}
                yield {"entry": entry}
        (made,) = done.result()
        file = await asyncio.to_thread(_mp4, made.picture, config.fps)
        completed = {"status": "completed", "progress": 100, "completed_at": int(time.time())}
        yield {"entry": {**entry, **completed}, "file": file}
    finally:
        if not done.done():
            worker.drop(job, "cancel")


def _mp4(frames: Any, fps: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_mp4(path, [np.asarray(frame.convert("RGB")) for frame in frames], fps)
        return path.read_bytes()


@router.post("/v1/videos", openapi_extra=described(Video, {_PICTURE: False}, as_json=True))
async def create(request: Request) -> Response:
    """Queues a video."""
    service: Any = request.app.state.service
    asked, files = await read_body(request, Video)
    given: dict[str, Any] = {}
    if sorted(files) != [_PICTURE] * service.edits:
        told = f"an image, uploaded as {_PICTURE}" if service.edits else "no image"
        raise ApiError(400, f"this model takes {told}", param=_PICTURE)
    if service.edits:
        pixels = service.config.limits.upload_pixels
        picture = await asyncio.to_thread(read_picture, files[_PICTURE], _PICTURE, pixels)
        given["image"] = picture.convert("RGB")
    if asked.num_frames is not None:
        if asked.seconds is not None:
            raise ApiError(400, "got num_frames and seconds; give one of them", param="seconds")
        given["num_frames"] = asked.num_frames
    elif asked.seconds is not None:  # a latent frame is four of the video, but for the first
        given["num_frames"] = 1 + 4 * round(asked.seconds * service.config.fps / 4)
    work = service.read(asked, alone=True, **given)
    events = making(service.worker, work, asked, service.config)
    return JSONResponse(service.videos.add(await anext(events), events).entry)


@router.get("/v1/videos")
async def listed(request: Request) -> Response:
    """All videos that are kept."""
    data = [record.entry for record in request.app.state.service.videos.newest()]
    return JSONResponse({"object": "list", "data": data, "has_more": False})


@router.get("/v1/videos/{video_id}")
async def one(video_id: str, request: Request) -> Response:
    """How far one is."""
    return JSONResponse(request.app.state.service.videos.find(video_id).entry)


@router.get("/v1/videos/{video_id}/content")
async def content(video_id: str, request: Request) -> Response:
    """The MP4 of one that is completed."""
    record: Record = request.app.state.service.videos.find(video_id)
    if (status := record.entry["status"]) != "completed":
        raise ApiError(400, f"the video is {status}", param="video_id", code="not_completed")
    return Response(record.file, media_type="video/mp4")


@router.post("/v1/videos/{video_id}/cancel")
async def cancel(video_id: str, request: Request) -> Response:
    """Ends one within a step."""
    videos: Videos = request.app.state.service.videos
    record = videos.find(video_id)
    videos.cancel(record)
    return JSONResponse(record.entry)


@router.delete("/v1/videos/{video_id}")
async def delete(video_id: str, request: Request) -> Response:
    """Ends one and forgets it."""
    videos: Videos = request.app.state.service.videos
    videos.delete(videos.find(video_id))
    return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})
