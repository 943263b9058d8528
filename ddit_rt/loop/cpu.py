"""The step loop of the host, and the reference semantics of every other one.

Every executor runs these lines, in this order, and must give the same trace. The only thing
that the host learns inside the loop is which branch was decided: a bucket, computed or reused.
On a CPU an engine runs by this loop. So do fits of step caches and the training of adapters, on
any device: their plans fix the patch size of every step, so that no scores are taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ddit_rt import ops
from ddit_rt.loop.protocol import CachePlan, CaptureReport, ProgressCallback, RunPlan, StepWatch
from ddit_rt.loop.trace import Ranges, RunTrace, build_trace, ranges
from ddit_rt.policies import patch_name
from ddit_rt.steps import Bucket, Signal

_RING = 4
"""Latents kept: the third difference and every solver table need the latest four."""

VelocityWatch = Callable[[int, Tensor, Tensor], None]
"""Called in every step with its index k, z_k, which is overwritten later, and the velocity v_k."""


class CpuExecutor:
    """Runs the step loop on the host. Holds no state between runs."""

    name = "cpu"
    form = "auto"
    captures: tuple[CaptureReport, ...] = ()

    def forget(self) -> None:
        """See `Executor.forget`: nothing is captured here."""

    @torch.no_grad()
    def run(
        self,
        plan: RunPlan,
        latents: Tensor,
        *,
        on_progress: ProgressCallback | None = None,
        should_stop: Callable[[], bool] | None = None,
        on_step: StepWatch | None = None,
        on_velocity: VelocityWatch | None = None,
        annotate: bool = False,
    ) -> tuple[Tensor, RunTrace]:
        """See `Executor.run`; `on_velocity` is called within every step."""
        mark = ranges(annotate)
        state = _RunState(plan, latents)
        seconds: list[float] = []
        cancelled = False
        with mark("run"):
            for step in range(plan.policy.steps):
                if should_stop is not None and should_stop():
                    cancelled = True
                    break
                started = time.perf_counter()
                with mark(f"step/{step}"):
                    branch = _run_step(plan, state, step, mark, on_velocity)
                seconds.append(time.perf_counter() - started)
                if on_step is not None:
                    on_step(step, branch, state.latents(step + 1).clone())
                if on_progress is not None:
                    on_progress(step)
        final = state.latents(len(seconds)).clone()
        return final, _trace(plan, state, seconds, executor=self.name, cancelled=cancelled)

    def open(
        self, plan: RunPlan, latents: Tensor, *, driver: str, annotate: bool = False
    ) -> CpuSession:
        """See `Executor.open`."""
        return CpuSession(plan, latents, f"{driver}-{self.name}", ranges(annotate))


class CpuSession:
    """See `StepSession`."""

    def __init__(self, plan: RunPlan, latents: Tensor, name: str, mark: Ranges) -> None:
        self._plan = plan
        self._state = _RunState(plan, latents)
        self._name = name
        self._mark = mark
        self._step = 0
        self._started = 0.0
        self._seconds: list[float] = []

    def decide(self, step: int, latents: Tensor) -> int:
        """See `StepSession.decide`."""
        self._started, self._step = time.perf_counter(), step
        with self._mark(f"step/{step}"), self._mark("decide"):
            self._state.latents(step).copy_(latents)
            return self._state.decide(step)

    def bucket(self, stage: int, index: int) -> Bucket:
        """See `StepSession.bucket`."""
        bucket = self._plan.buckets[stage][index]
        assert bucket is not None, "the policy table chose a bucket that it cannot reach"
        return bucket

    def signal(self) -> Signal | None:
        """See `StepSession.signal`."""
        return None if self._plan.cache is None else self._plan.cache.signal

    def velocity(self, stage: int, branch: int, latents: Tensor) -> Tensor:
        """See `StepSession.velocity`."""
        index = self._state.index(self._step)
        with self._mark(f"step/{self._step}"):
            return _run_branch(self._plan, stage, branch, latents, index, self._mark)

    def end_step(self) -> None:
        """See `StepSession.end_step`."""
        self._seconds.append(time.perf_counter() - self._started)

    def close(self, *, cancelled: bool) -> RunTrace:
        """See `StepSession.close`."""
        return _trace(
            self._plan, self._state, self._seconds, executor=self._name, cancelled=cancelled
        )


def _trace(
    plan: RunPlan, state: _RunState, seconds: list[float], *, executor: str, cancelled: bool
) -> RunTrace:
    return build_trace(
        record=state.record,
        cache=state.cache.record.tolist() if state.cache else None,
        seconds=seconds,
        policy=plan.policy,
        offered=plan.offered,
        tokens=plan.tokens(),
        sigmas=plan.solver.sigmas,
        executor=executor,
        solver=plan.solver.source,
        batch=state.history.shape[1],
        nonfinite=bool(state.decision[2]),
        cancelled=cancelled,
        notes=plan.notes,
    )


def _run_step(
    plan: RunPlan, state: _RunState, step: int, mark: Ranges, on_velocity: VelocityWatch | None
) -> int:
    """Takes a step and returns the branch that it took."""
    with mark("decide"):
        branch = state.decide(step)
    stage, latents = plan.stages[step], state.latents(step)
    velocity = _run_branch(plan, stage, branch, latents, state.index(step), mark)
    if on_velocity is not None:
        on_velocity(step, latents, velocity)
    with mark("solver"):
        state.advance(velocity, step)
    return branch


def _run_branch(
    plan: RunPlan, stage: int, branch: int, latents: Tensor, index: Tensor, mark: Ranges
) -> Tensor:
    reuse, place = divmod(branch, len(plan.offered))
    bucket = plan.buckets[stage][place]
    assert bucket is not None, "the policy table chose a bucket that it cannot reach"
    with mark(f"{'reuse' if reuse else 'model'}/{patch_name(plan.offered[place])}"):
        guided = plan.is_guided(stage)
        velocity = bucket.velocity(latents, index, reuse=bool(reuse), guided=guided)
        if plan.cache is not None and not reuse:
            plan.cache.computes()
        return velocity


class _RunState:
    """The tensors that live across the steps of one run, made anew for each."""

    def __init__(self, plan: RunPlan, latents: Tensor) -> None:
        coarse = len(plan.offered) - 1
        self._plan = plan
        self._sizes = [plan.patch_size * multiple for multiple in plan.offered[1:]]
        self._forced, self._thresholds = plan.policy.tensors()
        self._no_scores = torch.full(
            (latents.shape[0], coarse), float("nan"), dtype=torch.float32, device="cpu"
        )
        self._velocities = latents.new_zeros((plan.solver.velocity_depth - 1, *latents.shape))
        self._coefficients = plan.solver.coefficients
        self.history = latents.new_zeros((_RING, *latents.shape))
        self.history[0] = latents
        self.decision = torch.tensor([-1, 0, 0, 0], dtype=torch.int32, device="cpu")
        self.record = _zeros(plan.policy.steps, 3 + coarse)
        self._indices = torch.arange(plan.policy.steps, dtype=torch.int32, device=latents.device)
        self.cache = _CacheState(plan.cache) if plan.cache else None

    def latents(self, step: int) -> Tensor:
        """z_step: slot -step modulo 4, so that older latents follow the newest."""
        return self.history[-step % _RING]

    def index(self, step: int) -> Tensor:
        """`step` as the buckets take it."""
        return self._indices[step : step + 1]

    def decide(self, step: int) -> int:
        """Scores the latents, applies the policy and then the step cache; returns the branch."""
        policy = self._plan.policy
        scores = self._no_scores
        if policy.scored(step) and self._sizes:
            scores = ops.patch_scores(
                self.history, self._sizes, policy.quantile, policy.order, -step % _RING
            )
        ops.decide_(
            scores,
            self._forced,
            self._thresholds,
            self.decision,
            self.record,
            step,
            policy.dwell,
            policy.monotone,
        )
        if self.cache is not None:
            self.cache.decide(self, step, len(self._plan.offered))
        # The one value that the host reads per step; the CUDA executor branches on the device.
        return int(self.decision[3])

    def advance(self, velocity: Tensor, step: int) -> None:
        """Takes the solver's step in place: writes z_{step+1} into the ring."""
        ops.solver_step_(self.history, self._velocities, velocity, self._coefficients, step)


class _CacheState:
    """What a step cache keeps across the steps of one run.

    Attributes:
        record: One row a step, as `ops.decide_reuse_` writes them.
    """

    def __init__(self, plan: CachePlan) -> None:
        self._plan = plan
        self._increments, self._coefficients = plan.table.tensors()
        self._memory = _zeros(ops.CACHE_HEADER + plan.rows)
        self._no_signal = _zeros(0)
        self.record = _zeros(len(self._increments), ops.CACHE_RECORD)

    def decide(self, state: _RunState, step: int, buckets: int) -> None:
        """Decides whether the step reuses, and so turns the decided bucket into a branch."""
        table, signal = self._plan.table, self._no_signal
        source = self._plan.signal
        if source is not None and (source.keeps or table.signalled(step)):
            latents, previous = state.latents(step), state.latents(step - 1)
            signal = source.change(latents, previous, state.index(step))
        ops.decide_reuse_(
            signal,
            self._increments,
            self._coefficients,
            state.decision,
            self._memory,
            self.record,
            step,
            buckets,
            table.threshold,
            table.limit,
            table.growth,
        )


def _zeros(*sizes: int) -> Tensor:
    return torch.zeros(sizes, dtype=torch.float32, device="cpu")
