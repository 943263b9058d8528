"""A captured run whose solver steps are taken elsewhere: graphs replayed one at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ddit_rt.errors import StallError
from ddit_rt.loop.capture import CapturedLoop
from ddit_rt.loop.drive import Patience
from ddit_rt.loop.protocol import RunPlan
from ddit_rt.loop.trace import Ranges, RunTrace, build_trace
from ddit_rt.policies import patch_name
from ddit_rt.steps import Bucket, Signal


class CudaSession:
    """See `StepSession`.

    The device's update kernel enters latents: with the plan's coefficients, z_{k+1} is what lies in
    the place of the velocity. It keeps the history, and measures the patches for the decision.
    """

    def __init__(
        self,
        loop: CapturedLoop,
        plan: RunPlan,
        name: str,
        mark: Ranges,
        drop: Callable[[], None],
    ) -> None:
        """Goes on from a loop that has loaded the plan and begun; `drop` is for one that stalls."""
        self._graphs = loop.graphs
        self._loop = loop
        self._plan = plan
        self._name = name
        self._mark = mark
        self._drop = drop
        self._patience = Patience(plan, loop)
        self._stalled = False
        self._step = 0
        self._done = 0
        self._entered: Tensor | None = None

    def decide(self, step: int, latents: Tensor) -> int:
        """See `StepSession.decide`."""
        self._step, buffers, control = step, self._loop.buffers, self._loop.control
        with self._mark(f"step/{step}"), self._mark("decide"), self._working() as stream:
            if step:
                if self._entered is not None:  # the buckets were given others
                    buffers.latents.copy_(self._entered)
                buffers.velocity.copy_(latents)
                control.update(stream)
            self._entered = None
            self._loop.measure()
            control.decide(stream)
            if self._plan.cache is None and not self._plan.policy.scored(step):
                return self._plan.policy.forced[step]  # known, so that the host need not wait
            self._patience.until(lambda now: now.decided > step, "session")
            return int(control.branch(step))

    @contextmanager
    def _working(self) -> Iterator[int]:
        """On the executor's stream; a loop that stalls there is not used again."""
        try:
            with self._graphs.on_stream() as stream:
                yield stream
        except StallError:
            self._stalled = True
            self._drop()
            raise

    def bucket(self, stage: int, index: int) -> Bucket:
        """See `StepSession.bucket`."""
        return self._loop.bucket(stage, index)

    def signal(self) -> Signal | None:
        """See `StepSession.signal`."""
        return self._loop.signal if self._plan.cache is not None else None

    def velocity(self, stage: int, branch: int, latents: Tensor) -> Tensor:
        """See `StepSession.velocity`."""
        buffers = self._loop.buffers
        reuse, index = divmod(branch, len(self._plan.offered))
        name = f"{'reuse' if reuse else 'model'}/{patch_name(self._plan.offered[index])}"
        with self._mark(f"step/{self._step}"), self._mark(name), self._working():
            if self._entered is None:
                self._entered = buffers.latents.clone()
            buffers.latents.copy_(latents)
            self._loop.graph(stage, branch).replay()
            return buffers.velocity.clone()

    def end_step(self) -> None:
        """See `StepSession.end_step`. The device's own clock says when."""
        self._done += 1

    def close(self, *, cancelled: bool) -> RunTrace:
        """See `StepSession.close`."""
        if not self._stalled:
            with self._working() as stream:
                self._loop.control.finish(stream)
                self._patience.until(lambda now: now.finished, "session")
        return captured_trace(
            self._loop, self._plan, self._name, steps=self._done, cancelled=cancelled
        )


def captured_trace(
    loop: CapturedLoop,
    plan: RunPlan,
    executor: str,
    notes: tuple[str, ...] = (),
    *,
    steps: int | None = None,
    cancelled: bool | None = None,
) -> RunTrace:
    """The trace of a run that a captured loop has finished.

    Args:
        loop: The loop that has run.
        plan: The plan of the run.
        executor: Name of the executor, for the trace.
        notes: Notes that are added to the plan's.
        steps: Number of steps that are over; by default all that were decided.
        cancelled: Whether the run stopped early; by default whether steps are missing.
    """
    progress, rows = loop.control.progress(), loop.control.records()
    times = [time_ns for time_ns, _ in rows] + [loop.control.end_ns()]
    rows = rows[:steps]
    coarse = len(plan.offered) - 1
    return build_trace(
        record=torch.tensor(
            [values for _, values in rows], dtype=torch.float32, device="cpu"
        ).reshape(len(rows), 3 + coarse),
        cache=None if plan.cache is None else loop.control.cache_records(),
        seconds=[(end - start) * 1e-9 for start, end in itertools.pairwise(times)][: len(rows)],
        policy=plan.policy,
        offered=plan.offered,
        tokens=plan.tokens(),
        sigmas=plan.solver.sigmas,
        executor=executor,
        solver=plan.solver.source,
        batch=loop.buffers.latents.shape[0],
        nonfinite=progress.nonfinite,
        cancelled=progress.cancelled if cancelled is None else cancelled,
        notes=(*plan.notes, *notes),
    )
