"""What a run did, step by step, and why; and the ranges around it that profilers see."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from ddit_rt import checks
from ddit_rt.loop.perfetto import ENDING, trace_events
from ddit_rt.ops import CacheReason, Reason
from ddit_rt.policies import PolicyTable, patch_name

Ranges = Callable[[str], AbstractContextManager[Any]]
"""Opens a range, given its name without the leading `ddit_rt/`."""

_NONE: AbstractContextManager[Any] = nullcontext()


def ranges(annotate: bool) -> Ranges:
    """Ranges that profilers see, or ranges that cost next to nothing.

    torch.profiler sees `record_function`; Nsight sees NVTX. `emit_nvtx` would do for both, but it
    gives every range another name and adds one for each torch op.
    """
    if not annotate:
        return _no_range
    return _range_with_nvtx if torch.cuda.is_available() else _range


def _no_range(name: str) -> AbstractContextManager[Any]:  # noqa: ARG001 - the interface
    return _NONE


def _range(name: str) -> AbstractContextManager[Any]:
    return record_function(f"ddit_rt/{name}")


@contextmanager
def _range_with_nvtx(name: str) -> Iterator[None]:
    with _range(name), torch.cuda.nvtx.range(f"ddit_rt/{name}"):
        yield


IDLE_POLICY, IDLE_CACHE = "the policy took no coarse step", "the step cache reused no step"
"""How the note of a run begins in which what was asked for did nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One denoising step.

    Attributes:
        step: Index k.
        sigma: Noise level at its start.
        patch_size: Patch size by name, `"p"`, `"2p"`, `"4p"`.
        tokens: Image tokens that the blocks ran on: none where the step reused.
        scores: Score of each coarse size, the largest over the batch; empty if not scored.
        thresholds: Threshold tau of each coarse size; empty if not scored.
        latency_ms: Wall time of the step: decision, model and solver.
        reason: Why the step took this size.
        reused: Whether the latest residual of this size stood for the blocks.
        accumulated: Change since the latest computed step that the step cache compared, the
            largest over the batch; None if it compared none.
        cache_reason: Why the step computed or reused; empty without a step cache.
    """

    step: int
    sigma: float
    patch_size: str
    tokens: int
    scores: dict[str, float]
    thresholds: dict[str, float]
    latency_ms: float
    reason: str
    reused: bool = False
    accumulated: float | None = None
    cache_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class RunTrace:
    """A whole run.

    Attributes:
        steps: One record per step that ran.
        executor: Which executor ran it.
        solver: Class name of the scheduler behind the solver table.
        batch: Number of samples in the run.
        nonfinite: Whether the final latents, a score or a signal were NaN or infinite; with such
            a score p is forced, and with such a signal no step reuses.
        cancelled: Whether the run stopped early on request.
        notes: Slower paths that were taken and sizes that were not offered, with their reasons.
    """

    steps: tuple[StepRecord, ...]
    executor: str
    solver: str
    batch: int
    nonfinite: bool = False
    cancelled: bool = False
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self.steps)

    def __getitem__(self, index: int) -> StepRecord:
        return self.steps[index]

    @property
    def tokens(self) -> int:
        """Image tokens summed over the steps, per sample."""
        return sum(record.tokens for record in self.steps)

    @property
    def reused(self) -> int:
        """Steps that reused instead of computing."""
        return sum(record.reused for record in self.steps)

    @property
    def first_nonfinite(self) -> int | None:
        """First step whose score or signal was NaN or infinite; None where none was taken."""
        said = (_REASON_TEXT[Reason.NONFINITE], _CACHE_TEXT[CacheReason.NONFINITE])
        steps = (r.step for r in self.steps if r.reason == said[0] or r.cache_reason == said[1])
        return next(steps, None)

    @property
    def latency_ms(self) -> float:
        """Wall time of the step loop."""
        return sum(record.latency_ms for record in self.steps)

    def patch_sizes(self) -> list[str]:
        """Patch size of every step, by name."""
        return [record.patch_size for record in self.steps]

    def summary(self) -> str:
        """The run in one line, for logs."""
        counts = Counter(self.patch_sizes())
        parts = [f"{len(self)} steps ({', '.join(f'{n} x {size}' for size, n in counts.items())})"]
        parts += [f"{self.reused} reused"] * bool(self.reused)
        parts += [f"batch {self.batch}", self.executor, f"{self.latency_ms:.1f} ms"]
        parts += ["cancelled"] * self.cancelled + ["not finite"] * self.nonfinite
        return ", ".join(parts)

    def why_all_fine(self) -> str:
        """Why a policy took no coarse step; empty where it took one, or had tau = 0."""
        if any(record.patch_size != "p" for record in self.steps):
            return ""
        judged = [record for record in self.steps if record.scores]
        if not judged:
            counts = _counted(record.reason for record in self.steps)
            return f"none of the {len(self.steps)} steps was to be judged or coarse ({counts})"
        ratios = [
            (record.scores[size] / tau, record.scores[size], tau, size, record.step)
            for record in judged
            for size, tau in record.thresholds.items()
            if tau > 0 and math.isfinite(record.scores[size])
        ]
        if not ratios:
            return ""
        _, score, tau, size, step = min(ratios)
        nearest = f"{score:.2g} of {size} at step {step}, against {tau:.2g}"
        return f"no score fell below its threshold; nearest was {nearest}"

    def why_none_reused(self) -> str:
        """Why a step cache reused no step; empty where it reused one, or met NaN or infinity."""
        if self.reused or self.nonfinite or not any(r.cache_reason for r in self.steps):
            return ""
        counts = _counted(r.cache_reason.removeprefix("computed: ") for r in self.steps)
        changes = [r for r in self.steps if r.cache_reason == _CACHE_TEXT[CacheReason.ABOVE]]
        least = min((r.accumulated for r in changes if r.accumulated is not None), default=None)
        nearest = "" if least is None else f"; the least change was {least:.2g}"
        return f"all {len(self.steps)} steps computed ({counts}){nearest}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; numbers that are not finite become None."""
        data = asdict(self)
        data["tokens"] = self.tokens
        data["reused"] = self.reused
        data["latency_ms"] = self.latency_ms
        return _finite(data)  # type: ignore[no-any-return]

    def save(self, path: str | Path) -> Path:
        """Writes the trace as JSON: what `to_dict` gives.

        Args:
            path: A file that ends in `.json`. One that ends in `.perfetto.json` is written in
                Chrome's trace-event format instead, which ui.perfetto.dev and chrome://tracing
                load: a slice per step, scores and thresholds as counters.

        Returns:
            The path.

        Raises:
            TypeError, ValueError: No path, or none that ends in `.json`.
            OSError: It cannot be written.
        """
        path = checks.path("path", path)
        if path.suffix != ".json":
            raise ValueError(f"got the path {path}; a trace is JSON: let it end in .json")
        perfetto = path.name.endswith(ENDING)
        data = trace_events({"run": self}) if perfetto else self.to_dict()
        text = json.dumps(data, indent=1, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    def __str__(self) -> str:
        lines = ["step  sigma  patch  tokens  latency_ms  reason"]
        lines += [
            f"{r.step:4d}  {r.sigma:.3f}  {r.patch_size:>5}  {r.tokens:6d}  {r.latency_ms:10.2f}"
            f"  {_reason_text(r)}"
            for r in self.steps
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def build_trace(
    *,
    record: Tensor,
    seconds: list[float],
    policy: PolicyTable,
    offered: tuple[int, ...],
    tokens: dict[int, int],
    sigmas: tuple[float, ...],
    cache: Sequence[Sequence[float]] | None = None,
    **run: Any,
) -> RunTrace:
    """The trace of a run, read from its device record once, after the last step.

    Args:
        record: `[N, 3 + S]` as `ops.decide_` wrote it.
        seconds: Wall time of each step that ran.
        policy: The table that was run.
        offered: Patch sizes of the buckets, as multiples of p.
        tokens: Image tokens of each bucket.
        sigmas: Noise level of each step.
        cache: Per step `CacheReason` and accumulated change, as `ops.decide_reuse_` writes them;
            None without a step cache.
        run: The remaining fields of `RunTrace`.
    """
    rows = record[: len(seconds)].tolist()
    names = [patch_name(multiple) for multiple in offered]
    steps = []
    for step, (row, elapsed) in enumerate(zip(rows, seconds, strict=True)):
        bucket, reason = int(row[0]), Reason(int(row[1]))
        scored = policy.scored(step)
        why, accumulated = (CacheReason.OFF, math.nan) if cache is None else cache[step]
        reused = why == CacheReason.REUSED
        steps.append(
            StepRecord(
                step=step,
                sigma=sigmas[step],
                patch_size=names[bucket],
                tokens=0 if reused else tokens[bucket],
                scores=dict(zip(names[1:], row[3:], strict=True)) if scored else {},
                thresholds=(
                    dict(zip(names[1:], policy.thresholds[step], strict=True)) if scored else {}
                ),
                latency_ms=elapsed * 1e3,
                reason=policy.labels[step] or _REASON_TEXT[reason],
                reused=reused,
                accumulated=None if math.isnan(accumulated) else accumulated,
                cache_reason=_CACHE_TEXT[CacheReason(int(why))],
            )
        )
    return RunTrace(steps=tuple(steps), **run)


_REASON_TEXT = {
    Reason.FORCED: "forced",
    Reason.NONFINITE: "score not finite: base patch",
    Reason.BELOW: "score below threshold",
    Reason.ABOVE: "scores above thresholds",
    Reason.MONOTONE: "monotone: no coarser than before",
    Reason.DWELL: "dwell: too soon to change",
}


_CACHE_TEXT = {
    CacheReason.OFF: "",
    CacheReason.FORCED: "computed: forced",
    CacheReason.CHANGED: "computed: changed size",
    CacheReason.ABOVE: "computed: above threshold",
    CacheReason.LIMIT: "computed: reused often enough",
    CacheReason.NONFINITE: "computed: signal not finite",
    CacheReason.REUSED: "reused: below threshold",
}


def _counted(reasons: Iterable[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).items())


def _reason_text(record: StepRecord) -> str:
    scores = ", ".join(
        f"{size} {score:.2e} vs {record.thresholds[size]:.2e}"
        for size, score in record.scores.items()
    )
    text = f"{record.reason} ({scores})" if scores else record.reason
    if not record.cache_reason:
        return text
    change = "" if record.accumulated is None else f" ({record.accumulated:.3g})"
    return f"{text}; {record.cache_reason}{change}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
