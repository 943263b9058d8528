"""The step loop of one engine: what drives it, how it ends early, and its latest trace.

A run is driven in one of three ways. The executor's own loop takes its solver's steps from a table;
on a device it needs no host. Where a callback comes between the steps, or the scheduler is no
table, the scheduler takes them: in `by_scheduler` for `Engine.denoise`, and in the pipeline's own
loop for `Engine.__call__` (`pipeline_driven.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddit_rt import notices
from ddit_rt.engine.watch import UNWATCHED, RunWatch, StepView
from ddit_rt.errors import RunCancelled, ShapeError
from ddit_rt.loop import (
    IDLE_CACHE,
    IDLE_POLICY,
    Executor,
    ProgressCallback,
    RunPlan,
    RunTrace,
    StepSession,
    executor_for,
)
from ddit_rt.planning.outline import Outline
from ddit_rt.torch_state import callers_modes


class Finite:
    """Whether a tensor is finite throughout; on a device the answer is on its way meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        self._answer = torch.isfinite(tensor).all()
        self._arrived: torch.cuda.Event | None = None
        if self._answer.is_cuda:
            pinned = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
            self._answer = pinned.copy_(self._answer, non_blocking=True)
            stream = torch.cuda.current_stream(tensor.device)
            self._arrived = stream.record_event()

    def __bool__(self) -> bool:
        """On a device, waits until what was queued before this object was made is done."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._answer)


class FiniteCheck:
    """Refuses initial latents that are not finite: before the run, or after it on a device.

    There the run goes on meanwhile, so that the host need not wait for the answer.
    """

    def __init__(self, latents: Tensor) -> None:
        self._finite = Finite(latents)
        if not latents.is_cuda:
            self.require()

    def require(self) -> None:
        """Raises if they were not finite. On a device: only once the run is over."""
        if not self._finite:
            raise ValueError("the initial latents hold NaN or infinity; give finite noise")


StepCallback = Callable[[int, Tensor], Tensor | None]
"""Called after a step with its index and the new latents, which it may edit in place; may return
latents to go on from."""


class Loop:
    """Runs plans, one at a time.

    Args:
        device: The model's.

    Attributes:
        executor: What runs the steps.
        annotate: Whether profilers see named ranges.
        trace: The trace of the latest run, or None.
        watch: What the caller of the current run wants of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.annotate = False
        self.trace: RunTrace | None = None
        self.watch = UNWATCHED
        self._announced: set[str] = set()
        self.executor = executor_for(device)
        self._cancelled = threading.Event()
        self._running = False

    def cancel(self) -> None:
        """Ends the current run between two steps; from any thread."""
        self._cancelled.set()

    def run(
        self,
        plan: RunPlan,
        latents: Tensor,
        on_progress: ProgressCallback | None,
        *,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Tensor:
        """Runs a plan to its end, by its solver table.

        Args:
            plan: The plan.
            latents: z_0, as in `Engine.denoise`.
            on_progress: Called after every step with its index; see `ProgressCallback`.
            interrupted: Asked before every step; once true, the run ends early.

        Returns:
            Final latents; `trace` is the run's.

        Raises:
            ValueError: The initial latents are not finite.
            RunCancelled: `cancel` was called, or the run's watch stopped it.
        """
        stepped = self.watch.stepped
        with self._alone():
            finite = FiniteCheck(latents)
            final, self.trace = self.executor.run(
                plan,
                latents,
                on_progress=on_progress,
                should_stop=lambda: interrupted() or self._wish(),
                on_step=None if stepped is None else lambda *s: stepped(StepView.of(plan, *s)),
                annotate=self.annotate,
            )
        finite.require()
        if self._wish():
            raise cancelled(len(self.trace), plan.policy.steps)
        self.look_at(final)
        return final

    @contextmanager
    def watched(self, watch: RunWatch) -> Iterator[None]:
        """Runs within are watched."""
        before, self.watch = self.watch, watch
        try:
            yield
        finally:
            self.watch = before

    def _wish(self) -> bool:
        """Whether the current run is to end."""
        stopped = self.watch.stopped
        if stopped is not None and not self._cancelled.is_set() and stopped():
            self._cancelled.set()  # so that it is asked no more, and answers the same
        return self._cancelled.is_set()

    def announce(self, notes: Sequence[str]) -> None:
        """Warns of each note once in the engine's life."""
        for note in notes:
            if note not in self._announced:
                self._announced.add(note)
                notices.warn(note)

    def look_back(self, outline: Outline) -> None:
        """Notes, and says once, what was asked for and did nothing in the run that has ended."""
        if self.trace is None or len(self.trace) < outline.steps:
            return
        if outline.coarse and len(outline.offered) > 1:
            advice = (
                "raise its tau or the share of coarse steps, run more steps, or pass '2p:0.4,p'"
            )
            self._note_idle(IDLE_POLICY, self.trace.why_all_fine(), advice)
        if outline.cache is not None and outline.cache.threshold > 0:
            advice = "raise its threshold, let fewer steps compute always, or run more steps"
            self._note_idle(IDLE_CACHE, self.trace.why_none_reused(), advice)

    def _note_idle(self, what: str, reason: str, advice: str) -> None:
        if not reason:
            return
        assert self.trace is not None, "of the run that has ended"
        note = f"{what}: {reason}"
        self.trace = replace(self.trace, notes=(*self.trace.notes, note))
        if what not in self._announced:  # said once, whatever the reason was
            self._announced.add(what)
            notices.warn(f"{note}; {advice}")

    def look_at(self, final: Tensor | None) -> None:
        """Warns, and notes in the trace, where a run's final latents are not finite.

        NaN and infinity stay in the latents of a flow once they are there, so that the final ones
        tell of every step; where scores or signals were taken, the trace knows the step too.

        Args:
            final: The run's final latents. On a device the host waits for the answer here, behind
                the loop, whose end it has seen already.
        """
        if self.trace is None or final is None or (Finite(final) and not self.trace.nonfinite):
            return
        first, steps = self.trace.first_nonfinite, len(self.trace)
        when = "in the final latents" if first is None else f"before step {first} of {steps}"
        notices.warn(
            f"the latents became NaN or infinite during the run, noticed {when}; the result is not "
            "usable: check the model's weights and dtype, the prompt embeddings and the guidance"
        )
        self.trace = replace(self.trace, nonfinite=True)

    @contextmanager
    def driven(self, driver: str, steps: int) -> Iterator[DrivenRun]:
        """A run whose steps are taken elsewhere; afterwards `trace` is that run's.

        Args:
            driver: Name of what takes the steps, for the trace.
            steps: Number of steps.
        """
        with self._alone():
            run = DrivenRun(
                *(self.executor, self._wish, driver, steps),
                stepped=self.watch.stepped,
                annotate=self.annotate,
            )
            try:
                yield run
                run.check_cancelled()
            except RunCancelled:
                self.trace = run.close(early=True)
                raise
            except BaseException:
                run.close(early=True)
                raise
            self.trace = run.close()

    def check_alone(self) -> None:
        """Refuses a second run within a run: what a shape has captured holds one run's latents."""
        if self._running:
            raise ValueError(
                "a callback called the engine whose run it belongs to; let the run end first, or "
                "call another engine"
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.check_alone()
        self._running = True
        self._cancelled.clear()
        try:
            yield
        finally:
            self._running = False

    def by_scheduler(
        self,
        plan: RunPlan,
        latents: Tensor,
        scheduler: Any,
        callback: StepCallback | None,
    ) -> Tensor:
        """Runs a plan to its end, a diffusers scheduler taking its steps.

        Args:
            plan: The plan; its solver is `own_steps`.
            latents: z_0, as in `Engine.denoise`.
            scheduler: The run's own, its timesteps set.
            callback: See `StepCallback`.

        Returns:
            As `run`.

        Raises:
            ValueError, RunCancelled: As in `run`.
        """
        scheduler.set_begin_index(0)
        with self.driven("scheduler", plan.policy.steps) as run:
            session = run.open(plan, latents)
            for step, timestep in enumerate(scheduler.timesteps):
                run.check_cancelled()
                branch = session.decide(step, latents)
                velocity = session.velocity(plan.stages[step], branch, latents).float()
                latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                run.end_step(branch, latents.clone)
                with callers_modes():
                    given = None if callback is None else callback(step, latents)
                latents = latents if given is None else _like(given, latents)
        self.look_at(latents)
        return latents


class DrivenRun:
    """What a run whose steps are taken elsewhere has of its engine.

    Attributes:
        done: Number of steps that are over.
        notes: Notes that are added to those of the trace.
    """

    def __init__(
        self,
        executor: Executor,
        wish: Callable[[], bool],
        driver: str,
        steps: int,
        *,
        stepped: Callable[[StepView], None] | None,
        annotate: bool,
    ) -> None:
        self.done = 0
        self.notes: list[str] = []
        self._executor = executor
        self._wish = wish
        self._driver = driver
        self._stepped = stepped
        self._annotate = annotate
        self._plan: RunPlan | None = None
        self._session: StepSession | None = None
        self._steps = steps
        self._finite: FiniteCheck | None = None

    def open(self, plan: RunPlan, latents: Tensor) -> StepSession:
        """Begins the run.

        Args:
            plan: The plan.
            latents: z_0, float32.

        Raises:
            ValueError: The latents are not finite; on a device this shows at the end.
        """
        self._plan, self._finite = plan, FiniteCheck(latents)
        self._session = self._executor.open(
            plan, latents, driver=self._driver, annotate=self._annotate
        )
        return self._session

    def end_step(self, branch: int, latents: Callable[[], Tensor]) -> None:
        """Says that a step is over, apart from callbacks.

        Args:
            branch: The branch that the step took.
            latents: Returns a copy of z_{k+1}, float32, for whoever watches.
        """
        assert self._session is not None, "the first step opens the run"
        assert self._plan is not None, "so does its plan"
        self._session.end_step()
        if self._stepped is not None:
            self._stepped(StepView.of(self._plan, self.done, branch, latents()))
        self.done += 1

    def check_cancelled(self) -> None:
        """Raises `RunCancelled` if the run is to end."""
        if self._wish():
            raise cancelled(self.done, self._steps)

    def close(self, *, early: bool = False) -> RunTrace | None:
        """Ends the run and returns its trace, or None if it had not begun.

        Args:
            early: Whether an exception ends it.

        Raises:
            ValueError: The initial latents were not finite.
        """
        if self._session is None:
            return None
        trace = self._session.close(cancelled=early or self.done < self._steps)
        if self._finite is not None and not early:
            self._finite.require()
        return replace(trace, notes=(*trace.notes, *self.notes))


def _like(given: Tensor, latents: Tensor) -> Tensor:
    """What a callback returned, as the run has its latents."""
    if given.shape != latents.shape:
        raise ShapeError(
            f"the callback returned latents of shape {list(given.shape)}; expected "
            f"{list(latents.shape)}"
        )
    return given.to(latents)


def cancelled(done: int, steps: int) -> RunCancelled:
    """What a run that was cancelled ends with."""
    return RunCancelled(f"cancelled after {done} of {steps} steps")
