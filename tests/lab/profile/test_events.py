from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.profiler import record_function

from ddit_rt.lab.profile import events as profiling
from ddit_rt.lab.profile.accounting import device_spans


def entry(category: str, name: str, start: float, duration: float, correlation: int = -1) -> Any:
    arguments = {"correlation": correlation} if correlation >= 0 else {}
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start,
        "dur": duration,
        "args": arguments,
    }


# Two steps whose graphs are launched at 10 and 40 and run later, one kernel before them, a wait
# inside and one after all work.
TRACE = [
    {"ph": "M", "name": "process_name"},
    entry("cuda_runtime", "cudaMemcpyAsync", 0, 1, 1),
    entry("cuda_runtime", "cudaLaunchKernel", 2, 1, 2),
    entry("kernel", "embed", 5, 2, 2),
    entry("user_annotation", "ddit_rt/run", 4, 60),
    entry("user_annotation", "ddit_rt/model/p", 10, 5),
    entry("cuda_runtime", "cudaGraphLaunch", 11, 2, 3),
    entry("kernel", "block", 20, 10, 3),
    entry("kernel", "block", 32, 8, 3),
    entry("cuda_runtime", "cudaStreamSynchronize", 16, 20, 4),
    entry("user_annotation", "ddit_rt/model/p", 40, 5),
    entry("cuda_driver", "cuGraphLaunch", 41, 2, 5),
    entry("gpu_memset", "Memset", 50, 1, 5),
    entry("kernel", "block", 52, 6, 5),
    entry("user_annotation", "ddit_rt/model/2p", 60, 5),
    entry("cuda_runtime", "cudaDeviceSynchronize", 70, 5, 6),
]


def test_host_calls_are_counted_in_a_span() -> None:
    events = profiling.read_events(TRACE)
    during_work = {"cudaGraphLaunch": 1, "cudaStreamSynchronize": 1, "cuGraphLaunch": 1}
    assert profiling.host_calls(events, profiling.work_span(events)) == during_work
    in_ranges = profiling.range_span(events, "ddit_rt/model/p")
    assert in_ranges == (10, 45)
    assert profiling.host_calls(events, in_ranges) == during_work
    assert profiling.host_calls(events) == {
        "cudaMemcpyAsync": 1,
        **during_work,
        "cudaDeviceSynchronize": 1,
    }
    assert profiling.host_calls(events, profiling.range_span(events, "ddit_rt/model/4p")) == {}
    no_kernels = [event for event in events if event.category != "kernel"]
    assert profiling.host_calls(no_kernels, profiling.work_span(no_kernels)) == {}


def test_range_on_a_device_lasts_as_long_as_the_work_launched_in_it() -> None:
    events = profiling.read_events(TRACE)
    found = device_spans(events)
    assert [(one.name, one.start, one.end) for one in found] == [
        ("run", 20, 58),
        ("model/p", 20, 40),
        ("model/p", 50, 58),
    ]


def test_profile_of_a_run_on_the_cpu_shows_its_ranges() -> None:

    def call() -> None:
        for _ in range(3):
            with record_function("some/range"):
                time.sleep(0.002)

    cpu = torch.device("cpu")
    events = profiling.profile(call, cpu)
    ranges = profiling.ranges_of(events)
    seconds = [event.seconds for event in ranges if event.name == "some/range"]
    assert len(seconds) == 3
    assert min(seconds) >= 0.002  # sleep never wakes early
    assert profiling.host_calls(events) == {}


def test_time_of_an_event_without_those_inside_it() -> None:
    spans = {"a": (0, 10), "b": (1, 4), "c": (2, 3), "d": (4, 6), "e": (11, 12)}
    events = [profiling.Event("cpu_op", name, *span) for name, span in spans.items()]
    own = {event.name: seconds for event, seconds in profiling.own_seconds(events)}
    assert own == pytest.approx({"a": 5e-6, "b": 2e-6, "c": 1e-6, "d": 2e-6, "e": 1e-6})
