"""Section `kernels`: what a step launches, and what the host is asked for while a run goes on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from real_models import Case
from real_setup import Setup, captures_of
from timing import Call, attempt

from ddit_rt.lab.profile.events import (
    Event,
    device_ranges,
    host_calls,
    own_seconds,
    profile,
    range_span,
    ranges_of,
    work_span,
)
from ddit_rt.policies import StaticPolicy

_PATCHES = ("p", "4p")
_STEPS = 4
_MOST = 40


def kernels(setup: Setup, case: Case) -> dict[str, Any]:
    """Runs of a few steps at p, and at 4p, under torch's profiler."""
    problem = setup.engine_error()
    if problem is not None:
        return {"error": f"no engine: {problem}"}
    rows = {}
    for patch in _PATCHES:
        if patch in setup.costs(case):
            row, problem = attempt(lambda patch=patch: _row(setup, case, patch))  # type: ignore[misc]
            rows[patch] = row or {"error": problem}
    return {"rows": rows}


def _row(setup: Setup, case: Case, patch: str) -> dict[str, Any]:
    cuda = setup.device.type == "cuda"
    observed = _run(setup, case, patch, "host" if cuda else "auto")
    observed()  # captures
    events = annotated(setup, observed)
    row = {
        **kernel_table(events, f"ddit_rt/model/{patch}", cuda=cuda),
        "nodes": {
            name: count
            for report in captures_of(setup.engine)
            for name, count in report.nodes.items()
        },
    }
    if cuda:
        run = _run(setup, case, patch, setup.form)
        run()
        row |= call_counts(annotated(setup, run))
    assert setup.engine.last_trace is not None, "a run leaves a trace"
    return {**row, "ran_on": setup.engine.last_trace.executor}


def _run(setup: Setup, case: Case, patch: str, form: str) -> Call:
    arguments = {**setup.request(case), "num_inference_steps": _STEPS}
    policy = StaticPolicy([patch] * _STEPS)
    return lambda: setup.generate(arguments, policy, form)


def kernel_table(events: Sequence[Event], name: str, *, cuda: bool) -> dict[str, Any]:
    """What ran inside the ranges of a name, for a mean range, the longest first.

    Args:
        events: Of a run, by their start.
        name: Of the ranges, one a step.
        cuda: Whether kernels count; else the operators of torch, each without those it calls.

    Raises:
        RuntimeError: The profile shows no such range with work in it.
    """
    ranges = [event for event in ranges_of(events) if event.name == name]
    if cuda:
        ranges = device_ranges(events, ranges)
        timed = [(event, event.seconds) for event in events if event.category == "kernel"]
    else:
        timed = own_seconds([event for event in events if event.category == "cpu_op"])
    if not ranges:
        raise RuntimeError(f"the profile shows no range {name!r} with work in it")
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event, own in timed:
        if any(one.start <= event.start <= one.end for one in ranges):
            seconds[event.name] += own / len(ranges)
            counts[event.name] += 1
    total = sum(seconds.values())
    longest = sorted(seconds, key=seconds.__getitem__, reverse=True)
    return {
        "kernel_seconds": total,
        "kernel_count": sum(counts.values()) / len(ranges),
        "kernels": [
            {
                "name": kernel[:160],
                "count": counts[kernel] / len(ranges),
                "seconds": seconds[kernel],
                "share": seconds[kernel] / total,
            }
            for kernel in longest[:_MOST]
        ],
    }


def call_counts(events: Sequence[Event]) -> dict[str, Any]:
    """Calls of the host in the step loop, between the first and the last kernel, and in all.

    The kernels of the set-up come before the loop; and a profiler may not see all that runs inside
    a loop on the device, so that its last kernel seems to end early.
    """
    return {
        "host_calls_in_loop": host_calls(events, range_span(events, "ddit_rt/run")),
        "host_calls_during_work": host_calls(events, work_span(events)),
        "host_calls": host_calls(events),
    }


def annotated(setup: Setup, call: Call) -> list[Event]:
    """A profile in which our ranges can be seen."""
    engine: Any = setup.engine
    engine.annotate = True
    try:
        return profile(call, setup.device)
    finally:
        engine.annotate = False
