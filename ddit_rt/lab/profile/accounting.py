"""Where the time of a run went: per patch size and phase, from a profile or from the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ddit_rt.engine.cost import step_cost
from ddit_rt.lab.profile.events import Event, device_ranges, ranges_of
from ddit_rt.lab.profile.subject import Subject
from ddit_rt.loop import RunTrace, StepRecord
from ddit_rt.policies import DDiTPolicy, parse_patch
from ddit_rt.steps import latent_frames

PREFIX = "ddit_rt/"
MODEL, REUSE = "model", "reuse"
PHASES = ("decide", MODEL, REUSE, "solver")
"""Of a step; it has one of the two in the middle: its blocks run, or a residual stands for them."""
STEP, OTHER = "step", "other"


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The least that one call must do.

    Attributes:
        flops: Operations.
        bytes: Bytes to read and write.
    """

    flops: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A phase of all steps at one patch size.

    Attributes:
        patch: Patch size by name; empty for what belongs to none.
        phase: One of `PHASES`, `STEP` where only whole steps are known, or `OTHER`: loop, host
            and gaps.
        calls: Steps.
        seconds: Time of all calls.
        flops: Operations of all calls, at least.
        bytes: Bytes of all calls, at least.
    """

    patch: str
    phase: str
    calls: int
    seconds: float
    flops: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """A run, taken apart.

    Attributes:
        clock: What measured: `"device"`, `"wall"`, or `"trace"` (the engine's own step times).
        seconds: The loop, on that clock; the rows add up to it.
        rows: Coarsest patch size last, phases in order.
    """

    clock: str
    seconds: float
    rows: tuple[Row, ...]


WorkOf = Callable[[str, int], Work]
"""The least work of a phase (`PHASES` or `STEP`) in step k."""


def floors(subject: Subject, trace: RunTrace) -> WorkOf:
    """The least that each phase of a run's steps must do.

    The model reads its weights (activations are not counted; of a step that reuses, neither its
    residual nor what a signal reads). The solver reads latents and velocity
    and writes new latents and a history. The latents of the finite difference are read by decide
    on a CPU, and on CUDA by the solver of the step before, which is at them anyway. What sits in a
    cache between two phases counts as moved all the same.

    Args:
        subject: What ran.
        trace: Trace of the run.
    """
    model, latents = subject.model, subject.latents
    order = subject.policy.order if isinstance(subject.policy, DDiTPolicy) else 0
    on_cuda = trace.executor.startswith("cuda")
    scored = [bool(record.scores) for record in trace] + [False]
    latents_bytes = latents.numel() * 4
    update_bytes = 3 * latents_bytes + latents.numel() * model.dtype.itemsize
    costs = {
        (patch, reused): step_cost(
            model,
            height=latents.shape[-2],
            width=latents.shape[-1],
            multiple=parse_patch(patch),
            batch=subject.passes * latents.shape[0],
            text_tokens=subject.text_tokens,
            frames=latent_frames(latents.shape),
            reused=reused,
        )
        for patch, reused in {(record.patch_size, record.reused) for record in trace}
    }

    def work_of(phase: str, step: int) -> Work:
        cost = costs[trace[step].patch_size, trace[step].reused]
        decide = 0 if on_cuda or not scored[step] else (order + 1) * latents_bytes
        solver = update_bytes
        if on_cuda and scored[step + 1]:
            solver += (order - 1) * latents_bytes
        work = {
            "decide": Work(flops=0, bytes=decide),
            _middle(trace[step]): Work(flops=cost.flops, bytes=cost.weight_bytes),
            "solver": Work(flops=0, bytes=solver),
        }
        work[STEP] = Work(
            flops=sum(one.flops for one in work.values()),
            bytes=sum(one.bytes for one in work.values()),
        )
        return work[phase]

    return work_of


def _middle(record: StepRecord) -> str:
    """The phase of a step that makes its velocity."""
    return REUSE if record.reused else MODEL


def host_spans(events: Iterable[Event]) -> list[Event]:
    """The engine's ranges in a profile, in order of their start, without their prefix."""
    return [
        replace(event, name=event.name.removeprefix(PREFIX))
        for event in ranges_of(events)
        if event.name.startswith(PREFIX)
    ]


def device_spans(events: Sequence[Event]) -> list[Event]:
    """When the device did what was asked for inside each of those ranges."""
    return device_ranges(events, host_spans(events))


def account_of_spans(
    spans: Sequence[Event], trace: RunTrace, work_of: WorkOf, clock: str
) -> Account:
    """Sums the phases of every step.

    A phase that no span shows is left out; its time is in the rest. The loop is the range of the
    run on the host, and on a device what its own timer says.

    Raises:
        ValueError: The spans are not those of this run.
    """
    taken = [f"{_middle(record)}/{record.patch_size}" for record in trace]
    found: dict[str, list[Event]] = {"decide": [], MODEL: [], "solver": []}
    for span in spans:
        phase = span.name.partition("/")[0]
        found.get(MODEL if phase == REUSE else phase, []).append(span)
    counts = {phase: len(shown) for phase, shown in found.items()}
    if counts[MODEL] != len(trace) or set(counts.values()) - {0, len(trace)}:
        raise ValueError(f"the profile holds {counts} ranges of a run of {len(trace)} steps")
    ran = [span.name for span in found[MODEL]]
    if ran != taken:
        raise ValueError(f"the profile ran {ran}, the trace says {taken}")
    seconds = {
        (span.name.partition("/")[0], step): span.seconds
        for shown in found.values()
        for step, span in enumerate(shown)
    }
    total = trace.latency_ms / 1e3
    if clock == "wall":
        (run,) = (span for span in spans if span.name == "run")
        total = run.seconds
    rows = _rows(seconds, PHASES, trace, work_of)
    rest = total - sum(row.seconds for row in rows)
    rows.append(Row(patch="", phase=OTHER, calls=0, seconds=rest, flops=0, bytes=0))
    return Account(clock=clock, seconds=total, rows=tuple(rows))


def account_of_trace(trace: RunTrace, work_of: WorkOf) -> Account:
    """Whole steps, as the engine itself timed them."""
    seconds = {(STEP, record.step): record.latency_ms / 1e3 for record in trace}
    rows = _rows(seconds, (STEP,), trace, work_of)
    return Account(clock="trace", seconds=trace.latency_ms / 1e3, rows=tuple(rows))


def _rows(
    seconds: Mapping[tuple[str, int], float],
    phases: Sequence[str],
    trace: RunTrace,
    work_of: WorkOf,
) -> list[Row]:
    rows = []
    for patch in sorted(set(trace.patch_sizes()), key=parse_patch):
        at_size = [record.step for record in trace if record.patch_size == patch]
        for phase in phases:
            steps = [step for step in at_size if (phase, step) in seconds]
            if not steps:
                continue
            work = [work_of(phase, step) for step in steps]
            rows.append(
                Row(
                    patch=patch,
                    phase=phase,
                    calls=len(steps),
                    seconds=sum(seconds[phase, step] for step in steps),
                    flops=sum(one.flops for one in work),
                    bytes=sum(one.bytes for one in work),
                )
            )
    return rows
