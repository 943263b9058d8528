"""A request's images, from the queue to the answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ddit_rt import telemetry
from ddit_rt.engine.watch import StepView
from ddit_rt.loop import RunTrace
from ddit_rt.serving.schema import Lora

OnStep = Callable[[StepView, int], None]
"""Called with a step and with an image's place in its batch, in the worker's thread."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a request asks for.

    Attributes:
        prompt: The prompt.
        seeds: One seed for each image.
        arguments: Further arguments of the engine's call, the same for all images.
        negative_prompt: What to keep away from, where the pipeline takes it.
        style: The LoRA that it names.
        key: Works of one key can share a run; one whose key is None shares with none.
        on_step: Called after every step of the run.
    """

    prompt: str
    seeds: tuple[int, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    negative_prompt: str | None = None
    style: Lora | None = None
    key: Hashable | None = None
    on_step: OnStep | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """An image that is made.

    Attributes:
        picture: A `PIL.Image`, or the list of a video's frames.
        seed: Seed of its noise.
        trace: Trace of the run that made it.
    """

    picture: Any
    seed: int
    trace: RunTrace


class Job:
    """A request in the worker's hands; safe to use from any thread.

    Attributes:
        work: What it asks for.
        seconds: Time that it has.
        done: Gives the images, in the order of the seeds, or what went wrong.
        samples: The images that it has in the queue.
        started: Whether one of them has left the queue.
        context: What spans of its run belong to: where it was made.
    """

    def __init__(self, work: Work, seconds: float) -> None:
        self.work = work
        self.seconds = seconds
        self.done: Future[list[Made]] = Future()
        self.done.set_running_or_notify_cancel()  # so that nobody who waits for it can cancel it
        self.samples = [Sample(self, seed) for seed in work.seeds]
        self.started = False
        self.context = telemetry.current()
        self._deadline = time.monotonic() + seconds
        self._dropped = False
        self._made: dict[int, Made] = {}

    def drop(self) -> None:
        """Says that nobody waits for it any more."""
        self._dropped = True

    @property
    def left(self) -> float:
        """Seconds to its deadline, and 0 from then on."""
        return max(0.0, self._deadline - time.monotonic())

    @property
    def expired(self) -> bool:
        """Whether its deadline is over."""
        return self.left == 0

    @property
    def over(self) -> bool:
        """Whether no more work should go into it."""
        return self._dropped or self.done.done() or self.expired

    def give(self, made: Made) -> None:
        """Takes one of its images, once that is made."""
        self._made[made.seed] = made
        if len(self._made) == len(self.work.seeds) and not self.done.done():
            self.done.set_result([self._made[seed] for seed in self.work.seeds])

    def fail(self, error: BaseException) -> None:
        """Ends it with what went wrong."""
        if not self.done.done():
            self.done.set_exception(error)


class Sample:
    """One image of a job in the queue."""

    __slots__ = ("arrived", "job", "seed")

    def __init__(self, job: Job, seed: int) -> None:
        self.job = job
        self.seed = seed
        self.arrived = time.monotonic()
