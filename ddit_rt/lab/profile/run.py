"""A run under torch.profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddit_rt.lab.profile.accounting import (
    Account,
    account_of_spans,
    account_of_trace,
    device_spans,
    floors,
    host_spans,
)
from ddit_rt.lab.profile.ceilings import Ceilings
from ddit_rt.lab.profile.events import Event, profile
from ddit_rt.lab.profile.report import row_entry
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
    path = out / f"trace-{unprofiled.executor}.json.gz"
    events = profile(subject.run, subject.device, path)
    trace = subject.last_trace
    account, notes = _account(subject, form, events, trace)
    return {
        "executor": trace.executor,
        "clock": account.clock,
        "loop_ms": account.seconds * 1e3,
        "unprofiled_ms": unprofiled.latency_ms,
        "chrome_trace": str(path),
        "notes": [*notes, *trace.notes],
        "rows": [row_entry(row, account.seconds, ceilings) for row in account.rows],
        "trace": trace.to_dict(),
    }


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
