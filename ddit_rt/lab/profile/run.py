"""A run under torch.profiler."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ddit_rt.lab.profile.accounting import (
    Account,
    account_of_spans,
    account_of_trace,
    device_spans,
    host_spans,
)
from ddit_rt.lab.profile.ceilings import Ceilings
from ddit_rt.lab.profile.events import Event, read_events
from ddit_rt.lab.profile.floors import floors
from ddit_rt.lab.profile.report import run_entry
from ddit_rt.lab.profile.subject import Subject
from ddit_rt.loop import RunTrace


def profile_run(
    subject: Subject, form: str | None, ceilings: Ceilings, warm_up: int, out: Path
) -> dict[str, Any]:
    """Profiles one run and writes its Chrome trace.

    Args:
        subject: What to run.
        form: Executor, on CUDA; None on a CPU.
        ceilings: What the machine can do.
        warm_up: Runs before it; the latest gives the time without a profiler.
        out: Folder of the Chrome trace.

    Returns:
        An entry of `runs` in the report.
    """
    if form is not None:
        subject.engine.executor = form
    for _ in range(warm_up):
        unprofiled = subject.run()
    activities = [ProfilerActivity.CPU]
    if form is not None:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        trace = subject.run()
        if form is not None:
            torch.cuda.synchronize()
    path = out / f"trace-{trace.executor}.json.gz"
    profiler.export_chrome_trace(str(path))
    account, notes = _account(subject, form, _events(path), trace)
    return run_entry(
        account,
        trace,
        ceilings,
        unprofiled_ms=unprofiled.latency_ms,
        chrome_trace=str(path),
        notes=(*notes, *trace.notes),
    )


def _events(path: Path) -> list[Event]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return read_events(json.load(file)["traceEvents"])


def _account(
    subject: Subject, form: str | None, events: list[Event], trace: RunTrace
) -> tuple[Account, list[str]]:
    work_of = floors(subject, trace)
    if form is None:
        return account_of_spans(host_spans(events), trace, work_of, "wall"), []
    if form != "host":
        return account_of_trace(trace, work_of), []
    try:
        return account_of_spans(device_spans(events), trace, work_of, "device"), []
    except ValueError as error:  # a step that launched nothing, or events that were lost
        return account_of_trace(trace, work_of), [f"whole steps instead of phases: {error}"]
