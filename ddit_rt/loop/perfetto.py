"""Traces as ui.perfetto.dev and chrome://tracing load them: Chrome's trace-event format, as JSON.

A run is a process with one track of slices, a step each, inside one for the whole run; and with
counters of tokens, of every score beside its threshold, and of the change that the step cache
compared. Durations are those of the trace, rounded to nanoseconds. It has no time at which a step
began, so that steps lie end to end; `otherData` says what was measured and what was not.

Source: Trace Event Format, docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddit_rt.loop.trace import RunTrace, StepRecord

ENDING = ".perfetto.json"
"""How the names of such files end."""

_TRACK = 1
_HOST = (
    "durations measured by the host's wall clock around decision, model and solver; starts not "
    "measured: steps lie end to end, and what came between them, such as callbacks, is left out"
)
_DEVICE = (
    "durations measured by the device's own clock, from one decision to the next, with whatever "
    "came between them"
)

Event = dict[str, Any]


def trace_events(runs: Mapping[str, RunTrace]) -> dict[str, Any]:
    """A JSON object of the format.

    Args:
        runs: Traces by what to call them. Each begins at time 0: when a run began is not known.

    Returns:
        The object, ready for `json.dumps`; times are in microseconds, as the format has them.
    """
    return {
        "traceEvents": [
            event
            for place, (name, trace) in enumerate(runs.items(), start=1)
            for event in _run(place, name, trace)
        ],
        "displayTimeUnit": "ms",
        "otherData": {
            "producer": "ddit_rt",
            "times": {
                name: _DEVICE if "cuda" in trace.executor else _HOST for name, trace in runs.items()
            },
        },
    }


def _run(process: int, name: str, trace: RunTrace) -> Iterator[Event]:
    """Names, the slice of the whole run, and its steps."""
    track = {"pid": process, "tid": _TRACK}
    yield {"ph": "M", "name": "process_name", **track, "args": {"name": name}}
    yield {"ph": "M", "name": "thread_name", **track, "args": {"name": f"steps ({trace.executor})"}}
    lengths = [round(record.latency_ms * 1e6) for record in trace]
    about = {
        "executor": trace.executor,
        "solver": trace.solver,
        "batch": trace.batch,
        "tokens": trace.tokens,
        "reused_steps": trace.reused,
        "nonfinite": trace.nonfinite,
        "cancelled": trace.cancelled,
        "notes": list(trace.notes),
    }
    whole = {"ts": 0.0, "dur": sum(lengths) / 1e3}
    yield {"ph": "X", "name": "step loop", "cat": "run", **whole, **track, "args": about}
    start = 0
    for record, length in zip(trace, lengths, strict=True):
        yield {
            "ph": "X",
            "name": f"{record.patch_size} reused" if record.reused else record.patch_size,
            "cat": "reused" if record.reused else "computed",
            "ts": start / 1e3,
            "dur": length / 1e3,
            **track,
            "args": _about(record),
        }
        for counter, values in _counters(record).items():
            yield {"ph": "C", "name": counter, "ts": start / 1e3, "pid": process, "args": values}
        start += length


def _about(record: StepRecord) -> dict[str, Any]:
    """What a step's slice says when it is clicked; without what was not taken."""
    said: dict[str, Any] = {
        "step": record.step,
        "sigma": record.sigma,
        "patch_size": record.patch_size,
        "tokens": record.tokens,
        "reason": record.reason,
        "reused": record.reused,
    }
    for size, score in record.scores.items():
        said |= {f"score {size}": score, f"threshold {size}": record.thresholds[size]}
    if record.cache_reason:
        said["cache_reason"] = record.cache_reason
    if record.accumulated is not None:
        said["accumulated"] = record.accumulated
    return {name: _json(value) for name, value in said.items()}


def _json(value: Any) -> Any:
    """JSON has no word for a number that is not finite: it is told as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _counters(record: StepRecord) -> dict[str, dict[str, float]]:
    """Series by counter; one that was not taken in this step has no event."""
    found: dict[str, dict[str, float]] = {"tokens": {"tokens": record.tokens}}
    for size, score in record.scores.items():
        pair = {"score": score, "threshold": record.thresholds[size]}
        found[f"score {size}"] = {name: v for name, v in pair.items() if math.isfinite(v)}
    if record.accumulated is not None and math.isfinite(record.accumulated):
        found["change since the last computed step"] = {"accumulated": record.accumulated}
    return {name: values for name, values in found.items() if values}
