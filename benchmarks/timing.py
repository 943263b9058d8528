"""Timing of calls that may fail, on a CPU or a CUDA device.

Methods take turns, so that a machine that speeds up or slows down meanwhile does so for all of
them alike. On CUDA a run is timed by two events on the current stream, and by the host's clock
between two synchronisations.
"""

from __future__ import annotations

import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch

from ddit_rt.lab.profile.ceilings import cuda_events

Call = Callable[[], Any]

WARM_UP_CALLS = 2
"""Calls before the first measured one."""
_ERROR_CHARACTERS = 600


class Deadline:
    """When to stop adding repeats: a command may be killed after some minutes."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds left; negative once it has passed."""
        return self._end - time.perf_counter()


@dataclass
class Measured:
    """What the turns of one method gave.

    Attributes:
        seconds: Time of every measured call, on CUDA by events.
        wall_seconds: The same by the host's clock.
        first_call_seconds: Wall time of building the method and of its first call.
        warm_seconds: Wall time of the last call that warmed it up.
        results: What every measured call returned.
        error: Why it dropped out; None if it did not.
        provisional: Whether the values are those of the last call that warmed it up: they stand
            until the first round, in case there is none.
    """

    seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    first_call_seconds: float | None = None
    warm_seconds: float = 0.0
    results: list[Any] = field(default_factory=list)
    error: str | None = None
    provisional: bool = False

    def add(self, outcome: tuple[float, float, Any], *, provisional: bool = False) -> None:
        """Takes in what `timed` returned; the first measured call displaces a provisional one."""
        if self.provisional or provisional:
            self.seconds, self.wall_seconds, self.results = [], [], []
        self.provisional = provisional
        for values, value in zip(
            (self.seconds, self.wall_seconds, self.results), outcome, strict=True
        ):
            values.append(value)


def rounds_of(
    calls: Mapping[str, Call], rounds: int, steps: int
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Lets calls that cannot fail take turns on a CPU, after a round that warms up.

    Args:
        calls: By name.
        rounds: Measured rounds.
        steps: By how many a call's time is divided.

    Returns:
        By name microseconds a step, `median`, `min` and `max`; and what each call returned.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, Any] = {}
    for index in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            results[name] = call()
            if index:
                times[name].append((time.perf_counter() - started) * 1e6 / steps)
    return {name: extremes(values) for name, values in times.items()}, results


def extremes(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and quartiles of one or more values, and their number."""
    quartiles = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else [values[0]] * 3
    )
    return {
        **extremes(values),
        "lower_quartile": quartiles[0],
        "upper_quartile": quartiles[2],
        "count": len(values),
    }


def synchronize(device: torch.device) -> None:
    """Waits for all work of a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Call, device: torch.device) -> tuple[float, float, Any]:
    """Seconds of one call, its wall seconds, and its result; the two are equal on a CPU."""
    if device.type != "cuda":
        started = time.perf_counter()
        result = call()
        wall = time.perf_counter() - started
        return wall, wall, result
    begin, end = cuda_events()
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    begin.record()
    result = call()
    end.record()
    torch.cuda.synchronize(device)
    wall = time.perf_counter() - started
    return begin.elapsed_time(end) * 1e-3, wall, result


def attempt(call: Call) -> tuple[Any, str | None]:
    """The result of a call, or the text of its error.

    Any error: an allocation, a compiler or a kernel that fails must not end the other methods.
    """
    try:
        return call(), None
    except Exception as error:  # noqa: BLE001 - see above; the text goes into the record
        text = f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS]
    # Out of the handler, where the traceback no longer holds the tensors of the call.
    release()
    return None, text


def release() -> None:
    """Gives cached memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` in the main thread after this long.

    A compiler may take longer than a command is given; its method then drops out.
    """

    def expire(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def take_turns(
    builders: Mapping[str, Callable[[], Call]],
    *,
    repeats: int,
    device: torch.device,
    deadline: Deadline,
    warm_up_limit: float = 300.0,
    on_news: Callable[[Mapping[str, Measured]], None] | None = None,
) -> dict[str, Measured]:
    """Builds and warms every method up, then measures them in interleaved rounds.

    Args:
        builders: By name, what makes a method's call; runs under the warm-up's limit too.
        repeats: Rounds; fewer where the deadline comes first.
        device: Device that the calls work on.
        deadline: Methods get ready while it leaves time for a round of those that are ready; no
            further round starts that would end after it.
        warm_up_limit: Seconds that building and warming up one method may take.
        on_news: Told whenever more is known, to write it down: the command may be killed.
    """
    measured = {name: Measured() for name in builders}
    tell = on_news or (lambda _: None)
    calls: dict[str, Call] = {}
    for name, build in builders.items():
        round_seconds = sum(measured[ready].warm_seconds for ready in calls)
        limit = min(warm_up_limit, deadline.left - round_seconds)
        warm_up = partial(_warm_up, build, measured[name], device, limit)
        call, measured[name].error = attempt(warm_up)
        if measured[name].error is None:
            calls[name] = call
        tell(measured)
    longest = 0.0
    for index in range(repeats):
        if index and deadline.left < longest:
            break
        started = time.perf_counter()
        for name, call in calls.items():
            if measured[name].error is None:
                _turn(call, measured[name], device, deadline)
        tell(measured)
        longest = max(longest, time.perf_counter() - started)
    return measured


def _turn(call: Call, measured: Measured, device: torch.device, deadline: Deadline) -> None:
    if measured.provisional and deadline.left <= 0:
        return
    outcome, measured.error = attempt(partial(timed, call, device))
    if measured.error is None:
        measured.add(outcome)


def _warm_up(
    build: Callable[[], Call], measured: Measured, device: torch.device, limit: float
) -> Call:
    if limit <= 0:
        raise TimeoutError("no time was left to build it; run it alone, or give a larger budget")
    started = time.perf_counter()
    with time_limit(limit):
        call = build()
        for index in range(WARM_UP_CALLS):
            outcome = timed(call, device)
            measured.warm_seconds = outcome[1]
            if index == 0:
                measured.first_call_seconds = time.perf_counter() - started
        measured.add(outcome, provisional=True)
    return call
