"""Reading a profile of torch: what the host asked of the device, and how long ranges took there.

kineto's chrome trace gives, on one clock, ranges of `torch.profiler.record_function`, calls of the
CUDA runtime and what ran on the device. What runs on the device carries the correlation number of
the call that launched it, also where that call launches a whole graph.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

HOST_CALLS = (
    "cudaGraphLaunch",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cuGraphLaunch",
    "cuStreamSynchronize",
    "cuCtxSynchronize",
    "cuEventSynchronize",
    "cuMemcpy",
)
"""Beginnings of the names that are counted: waits of the host, copies, and launches of graphs."""

Span = tuple[float, float]
"""Begin and end on the trace's clock, in microseconds."""

EVER: Span = (float("-inf"), float("inf"))
NEVER: Span = (float("inf"), float("-inf"))

_CALLS = ("cuda_runtime", "cuda_driver")
_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a trace; times in microseconds.

    Attributes:
        category: kineto's: `user_annotation`, `cuda_runtime`, `kernel`, ...
        name: Name of the range, the call or the kernel.
        start: When it began.
        end: When it ended.
        correlation: Joins calls and what they launched; -1 for none.
    """

    category: str
    name: str
    start: float
    end: float
    correlation: int = -1

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.end - self.start) * 1e-6


def profile(call: Callable[[], Any], device: torch.device, path: Path | None = None) -> list[Event]:
    """Events of one call and of all its work on the device.

    Args:
        call: What to profile.
        device: Where it works.
        path: A `.json.gz` file for the Chrome trace; None: it is not kept.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory(prefix="ddit_rt-") as folder:
        kept = path or Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(kept))
        data = kept.read_bytes() if path is None else gzip.decompress(kept.read_bytes())
        return read_events(json.loads(data)["traceEvents"])


def read_events(entries: Iterable[dict[str, Any]]) -> list[Event]:
    """Events with a duration of a chrome trace, by their start."""
    events = [
        Event(
            entry.get("cat", ""),
            entry.get("name", ""),
            float(entry["ts"]),
            float(entry["ts"]) + float(entry.get("dur", 0)),
            int(entry.get("args", {}).get("correlation", -1)),
        )
        for entry in entries
        if entry.get("ph") == "X"
    ]
    return sorted(events, key=lambda event: event.start)


def host_calls(events: Sequence[Event], span: Span = EVER) -> dict[str, int]:
    """How often the host called each of `HOST_CALLS`, by full name.

    Args:
        events: Events of one run.
        span: Only calls count that began within it.
    """
    return dict(
        Counter(
            event.name
            for event in events
            if event.category in _CALLS
            and event.name.startswith(HOST_CALLS)
            and span[0] <= event.start <= span[1]
        )
    )


def work_span(events: Sequence[Event]) -> Span:
    """From the start of the first kernel to the end of the last one; empty if there is none."""
    return _span([event for event in events if event.category == "kernel"])


def range_span(events: Sequence[Event], name: str) -> Span:
    """From the start of the first range of that name to the end of the last one."""
    return _span([event for event in ranges_of(events) if event.name == name])


def _span(events: Sequence[Event]) -> Span:
    if not events:
        return NEVER
    return min(event.start for event in events), max(event.end for event in events)


def own_seconds(events: Iterable[Event]) -> list[tuple[Event, float]]:
    """Events of one thread with the time that is not that of others inside them."""
    found: list[tuple[Event, float]] = []
    stack: list[tuple[Event, float]] = []  # those that are open, and the time of what they hold

    def close() -> None:
        event, held = stack.pop()
        found.append((event, event.seconds - held))
        if stack:
            stack[-1] = (stack[-1][0], stack[-1][1] + event.seconds)

    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        while stack and stack[-1][0].end <= event.start:
            close()
        stack.append((event, 0.0))
    while stack:
        close()
    return found


def ranges_of(events: Iterable[Event]) -> list[Event]:
    """The ranges among them."""
    return [event for event in events if event.category == "user_annotation"]


def device_ranges(events: Sequence[Event], ranges: Iterable[Event]) -> list[Event]:
    """When the device did what the host asked for inside each range.

    From the start of the first to the end of the last kernel, copy or fill that a call inside the
    range launched, a graph's among them; a range that launched nothing has none.

    Args:
        events: Events of the run, ordered by their start.
        ranges: Some of them.
    """
    calls = [event for event in events if event.category in _CALLS and event.correlation >= 0]
    starts = [call.start for call in calls]
    work: dict[int, list[Event]] = {}
    for event in events:
        if event.category in _WORK:
            work.setdefault(event.correlation, []).append(event)
    found = []
    for one in ranges:
        inside = calls[bisect_left(starts, one.start) : bisect_left(starts, one.end)]
        launched = [item for call in inside for item in work.get(call.correlation, ())]
        if launched:
            begin, end = _span(launched)
            found.append(replace(one, start=begin, end=end))
    return found
