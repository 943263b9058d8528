"""Video jobs of several replicas: the front keeps the jobs, and the replicas make the videos."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import Response

from ddit_rt.serving.config import ServeConfig
from ddit_rt.serving.errors import ApiError, as_api_error
from ddit_rt.serving.ray_calls import Calls
from ddit_rt.serving.ray_replica import Call, Message
from ddit_rt.serving.videos import Remembered


@dataclass
class Record:
    """A video that a replica has accepted.

    Attributes:
        told: The entry of the video as its replica tells it.
        name: The video's identifier, the same whichever replica makes it.
        file: The MP4, once it is completed.
        task: The task that listens to the replica.
    """

    told: dict[str, Any]
    name: str = field(default_factory=lambda: f"video_{secrets.token_hex(12)}")
    file: bytes = b""
    task: asyncio.Task[None] | None = None

    @property
    def status(self) -> str:
        """The status as OpenAI has it."""
        return str(self.told["status"])

    @property
    def over(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in ("completed", "failed")

    def fail(self, error: ApiError) -> None:
        """Notes that the video cannot be made."""
        told = {"code": error.code, "message": error.body()["error"]["message"]}
        self.told = {**self.told, "status": "failed", "error": told}


class RemoteVideos(Remembered[Record]):
    """Stands in for `Videos` before the routes of `ddit_rt.serving.videos`."""

    def __init__(self, calls: Calls, config: ServeConfig) -> None:
        super().__init__(config)
        self._calls = calls

    async def add(self, call: Call) -> Record | Response:
        """Asks a replica for a video; where it refuses, returns its answer."""
        events = self._calls("video", call)
        _, first = await events.__anext__()
        if "entry" not in first:
            await events.aclose()
            return Response(first["body"], first["status"], media_type="application/json")
        record = Record(first["entry"])
        self._records[record.name] = record
        record.task = asyncio.create_task(self._follow(record, events))
        return record

    def cancel(self, record: Record) -> None:
        """Ends a video that is not done."""
        if not record.over and record.task is not None:
            record.task.cancel()
            record.fail(ApiError(400, "cancelled by the client", code="cancelled"))

    def delete(self, record: Record) -> None:
        """Ends a video if it is not done, and forgets it."""
        self.cancel(record)
        self._records.pop(record.name, None)

    def entry(self, record: Record) -> dict[str, Any]:
        """A record as OpenAI's clients read it."""
        return {**record.told, "id": record.name}

    async def _follow(
        self, record: Record, events: AsyncGenerator[tuple[int, Message], None]
    ) -> None:
        created = record.told["created_at"]
        try:
            async with aclosing(events):
                async for _, event in events:
                    record.told = {**_entry(event), "created_at": created}
                    record.file = event.get("file", b"")
        except Exception as error:  # noqa: BLE001 - of whatever kind, it is the video's
            record.fail(as_api_error(error))
        self._make_room()


def _entry(event: Message) -> dict[str, Any]:
    """The entry in an event of an accepted video."""
    if "entry" not in event:  # its first replica accepted it and died, and this one refuses it
        raise ApiError(503, "the video's replica died, and no other takes it", code="replica_died")
    entry: dict[str, Any] = event["entry"]
    return entry
