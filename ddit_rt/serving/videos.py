"""`/v1/videos`: jobs that are asked for, looked up, fetched, cancelled and deleted."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ddit_rt.errors import RunCancelled
from ddit_rt.lab.measure.video_file import write_mp4
from ddit_rt.serving.config import ServeConfig
from ddit_rt.serving.errors import ApiError, as_api_error
from ddit_rt.serving.forms import described, read_body
from ddit_rt.serving.jobs import Job
from ddit_rt.serving.schema import Video
from ddit_rt.serving.uploads import read_picture
from ddit_rt.serving.worker import Worker

router = APIRouter()
_NO_DEADLINE = float("inf")
_PICTURE = "input_reference"
_MOST = 1000
"""Videos that are remembered."""


@dataclass
class Record:
    """A video from its request on.

    Attributes:
        job: Its job.
        asked: Its request.
        seed: Its seed.
        name: Its identifier.
        created: When it was asked for, as a Unix time.
        completed: When it was done.
        file: The MP4.
        error: What went wrong.
        cancelled: Whether its client ended it.
    """

    job: Job
    asked: Video
    seed: int
    name: str = field(default_factory=lambda: f"video_{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    completed: int | None = None
    file: bytes = b""
    error: ApiError | None = None
    cancelled: bool = False

    @property
    def status(self) -> str:
        """As OpenAI has it; a cancelled one has failed."""
        if self.error is not None:
            return "failed"
        if self.completed is not None:
            return "completed"
        return "in_progress" if self.job.started else "queued"

    @property
    def over(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in ("completed", "failed")


class Kept(Protocol):
    """What is remembered of a video."""

    name: str
    file: bytes

    @property
    def over(self) -> bool:
        """Whether nothing will change any more."""


R = TypeVar("R", bound=Kept)


class Remembered(Generic[R]):
    """The videos that a server can be asked for; used in its event loop alone."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._records: OrderedDict[str, R] = OrderedDict()

    def find(self, name: str) -> R:
        """Finds a video by its identifier."""
        if name not in self._records:
            raise ApiError(404, "no such video", param="video_id", code="video_not_found")
        return self._records[name]

    def newest(self) -> list[R]:
        """All videos, newest first."""
        return list(reversed(self._records.values()))

    def _make_room(self) -> None:
        """Forgets the oldest that are done, as long as there are too many, or too many bytes."""
        for name, record in list(self._records.items()):
            held = sum(len(one.file) for one in self._records.values())
            if held <= self._config.video_bytes and len(self._records) <= _MOST:
                return
            if record.over:
                del self._records[name]


class Videos(Remembered[Record]):
    """The videos of one worker."""

    def __init__(self, worker: Worker, config: ServeConfig) -> None:
        super().__init__(config)
        self._worker = worker
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, asked: Video, work: Any) -> Record:
        """Queues one."""
        record = Record(self._worker.submit(work, _NO_DEADLINE), asked, work.seeds[0])
        self._records[record.name] = record
        task = asyncio.get_running_loop().create_task(self._follow(record))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return record

    def cancel(self, record: Record) -> None:
        """Ends one that is not done."""
        if not record.job.done.done():
            record.cancelled = True
            self._worker.drop(record.job, "cancel")

    def delete(self, record: Record) -> None:
        """Ends it if need be, and forgets it."""
        self.cancel(record)
        self._records.pop(record.name, None)

    def entry(self, record: Record) -> dict[str, Any]:
        """A record as OpenAI's clients read it."""
        error = record.error
        told = error and {"code": error.code, "message": error.body()["error"]["message"]}
        return {
            "id": record.name,
            "object": "video",
            "model": self._config.model,
            "status": record.status,
            "progress": 100 * (record.completed is not None),
            "created_at": record.created,
            "completed_at": record.completed,
            "prompt": record.asked.prompt,
            "size": record.asked.size or "auto",
            "seconds": None if record.asked.seconds is None else f"{record.asked.seconds:g}",
            "error": told,
            "seed": record.seed,
        }

    async def _follow(self, record: Record) -> None:
        try:
            (made,) = await asyncio.wrap_future(record.job.done)
            record.file = await asyncio.to_thread(_mp4, made.picture, self._config.fps)
            record.completed = int(time.time())
        except Exception as error:  # noqa: BLE001 - of whatever kind, it is the video's
            ended = record.cancelled or isinstance(error, RunCancelled)
            cancelled = ApiError(400, "cancelled by the client", code="cancelled")
            record.error = cancelled if ended else as_api_error(error)
        self._make_room()


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
    return JSONResponse(service.videos.entry(service.videos.add(asked, work)))


@router.get("/v1/videos")
async def listed(request: Request) -> Response:
    """All videos that are kept."""
    videos: Videos = request.app.state.service.videos
    data = [videos.entry(record) for record in videos.newest()]
    return JSONResponse({"object": "list", "data": data, "has_more": False})


@router.get("/v1/videos/{video_id}")
async def one(video_id: str, request: Request) -> Response:
    """How far one is."""
    videos: Videos = request.app.state.service.videos
    return JSONResponse(videos.entry(videos.find(video_id)))


@router.get("/v1/videos/{video_id}/content")
async def content(video_id: str, request: Request) -> Response:
    """The MP4 of one that is completed."""
    record = request.app.state.service.videos.find(video_id)
    if record.status != "completed":
        raise ApiError(400, f"the video is {record.status}", param="video_id", code="not_completed")
    return Response(record.file, media_type="video/mp4")


@router.post("/v1/videos/{video_id}/cancel")
async def cancel(video_id: str, request: Request) -> Response:
    """Ends one within a step."""
    videos: Videos = request.app.state.service.videos
    record = videos.find(video_id)
    videos.cancel(record)
    return JSONResponse(videos.entry(record))


@router.delete("/v1/videos/{video_id}")
async def delete(video_id: str, request: Request) -> Response:
    """Ends one and forgets it."""
    videos: Videos = request.app.state.service.videos
    videos.delete(videos.find(video_id))
    return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})
