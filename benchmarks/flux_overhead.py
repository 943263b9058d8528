"""Section `overhead`: what a loop costs beside its model, and what the host does meanwhile."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from flux_model import Case
from flux_setup import Setup
from timing import Call, Measured, attempt, spread, take_turns

from ddit_rt.lab.profile.events import (
    Event,
    host_calls,
    profile,
    range_seconds,
    range_span,
    work_span,
)
from ddit_rt.policies import StaticPolicy

_PATCHES = ("p", "4p")
_PROFILES = 3


def overhead(setup: Setup, case: Case) -> dict[str, Any]:
    """Loops with all steps at p, and at 4p, in every form of the executor.

    The model's time is taken from a profiled run of the form in which the host launches each step
    (on a CPU, of the only one). What is beside it comes from runs without a profiler: `loop`, by
    the steps' own times in the trace, and `wall`, of the whole call, its set-up included.
    """
    problem = setup.engine_error()
    if problem is not None:
        return {"error": f"no engine: {problem}"}
    return {"rows": {patch: _patch_row(setup, case, patch) for patch in _PATCHES}}


def _patch_row(setup: Setup, case: Case, patch: str) -> dict[str, Any]:
    calls = {form: _loop(setup, case, patch, form) for form in setup.executors}
    measured = take_turns(
        {form: partial(_same, call) for form, call in calls.items()},
        repeats=setup.repeats,
        device=setup.device,
        deadline=setup.deadline,
        warm_up_limit=setup.warm_up_limit,
    )
    observer = "host" if setup.device.type == "cuda" else "auto"
    model, problem = attempt(
        lambda: model_seconds(setup, case, patch, _loop(setup, case, patch, observer))
    )
    rows = {form: _form_row(setup, calls[form], own, model) for form, own in measured.items()}
    return {"model_seconds": model, "model_error": problem, "executors": rows}


def _loop(setup: Setup, case: Case, patch: str, form: str) -> Call:
    """A run that returns the seconds of its steps together, by its trace."""
    arguments = setup.request(case)
    policy = StaticPolicy([patch] * case.steps)

    def run() -> float:
        setup.generate(arguments, policy, form)
        trace = setup.engine.last_trace
        assert trace is not None, "a run leaves a trace"
        return trace.latency_ms * 1e-3

    return run


def _same(call: Call) -> Call:
    return call


def _form_row(setup: Setup, call: Call, own: Measured, model: float | None) -> Mapping[str, Any]:
    if own.error is not None:
        return {"error": own.error}
    if not own.wall_seconds:
        return {"error": "no round was run"}
    row: dict[str, Any] = {
        "wall_seconds": spread(own.wall_seconds),
        "loop_seconds": spread(own.results),
    }
    if model is not None:
        for kind in ("wall", "loop"):
            total = row[f"{kind}_seconds"]["median"]
            row[f"{kind}_overhead_seconds"] = total - model
            row[f"{kind}_overhead_share"] = (total - model) / total
    if setup.device.type == "cuda":
        counts, problem = attempt(lambda: call_counts(annotated(setup, call)))
        row |= {"profile_error": problem} if problem is not None else counts
    return row


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


def model_seconds(setup: Setup, case: Case, patch: str, call: Call) -> float:
    """The model's time over all steps of a run: the median of a few that are profiled.

    Raises:
        RuntimeError: A profile does not show every step.
    """
    name = f"ddit_rt/model/{patch}"
    totals = []
    for _ in range(_PROFILES):
        seconds = range_seconds(annotated(setup, call), name, setup.device)
        if len(seconds) != case.steps:
            raise RuntimeError(
                f"the profile shows {len(seconds)} ranges {name!r} with work in them, for "
                f"{case.steps} steps"
            )
        totals.append(sum(seconds))
    return statistics.median(totals)
