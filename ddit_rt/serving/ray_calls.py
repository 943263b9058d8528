"""Calls of replicas, repeated at another replica if the first one dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import ActorUnavailableError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from ddit_rt.serving.config import ServeConfig
from ddit_rt.serving.errors import LOG, ApiError, not_ready, queue_full
from ddit_rt.serving.ray_replica import Call, Message

_MOST_DEATHS = 3
"""Replicas that may die of one request before it is given up; the request may be the reason."""

_PAUSE = 0.2
"""Seconds until an accepted request is sent again."""


class Calls:
    """Calls the replicas of one deployment."""

    def __init__(self, replicas: Any, config: ServeConfig) -> None:
        """Takes the deployment.

        Args:
            replicas: Handle of the deployment, with the option `stream`.
            config: What the operator sets.
        """
        self._replicas = replicas
        self._config = config

    async def everywhere(self, method: str, seconds: float) -> list[Any]:
        """Calls a method of every replica.

        Args:
            method: Name of the method, which takes no arguments.
            seconds: Time that the replicas have.

        Returns:
            What they return, without those that raised.

        Raises:
            ApiError: One did not answer in time.
        """
        try:
            answers = self._replicas.broadcast(method)
            found = await answers.results_async(timeout_s=seconds, return_exceptions=True)
        except TimeoutError as error:
            raise not_ready() from error
        return [one for one in found if not isinstance(one, BaseException)]

    async def __call__(self, method: str, call: Call) -> AsyncGenerator[tuple[int, Message], None]:
        """Calls a method of one replica, and of another one if that dies.

        A call that was accepted once is not refused by the next replica: if its queue is full, the
        call is made again until there is room.

        Args:
            method: Name of the method, an asynchronous generator.
            call: Its argument.

        Yields:
            The index and the value of each item that the method yields. They begin at 0 again
            with every replica, so a caller skips those that it has had.

        Raises:
            ApiError: All queues are full, or too many replicas died of the call.
        """
        deaths = tries = 0
        while True:
            tries += 1
            answer = getattr(self._replicas, method).remote(call)
            place = 0
            try:
                async for message in answer:
                    if tries > 1 and message.get("status") == 429:
                        break
                    yield place, message
                    place += 1
                else:
                    return
            except (RayError, RayServeException) as error:
                deaths += self._deaths(error, first=tries == 1)
                if deaths == _MOST_DEATHS:
                    told = f"{deaths} replicas ended while they ran this request"
                    raise ApiError(503, told, code="replicas_died") from error
            finally:
                answer.cancel()
            await asyncio.sleep(_PAUSE)

    def _deaths(self, error: Exception, *, first: bool) -> int:
        """Number of replicas, 0 or 1, that died of a failed call; raises if that is final."""
        if isinstance(error, BackPressureError):
            if first:
                raise queue_full(self._config.max_queue, 1) from error
            return 0
        if isinstance(error, RayTaskError):
            raise error
        if isinstance(error, RayServeException):
            raise not_ready() from error
        LOG.warning("a replica is gone, and its request goes to another: %s", type(error).__name__)
        return int(not isinstance(error, ActorUnavailableError))
