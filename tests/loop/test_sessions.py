"""Runs whose solver steps are taken elsewhere, on both executors, beside runs by the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from emulated_graphs import EmulatedGraphs
from models import noise
from scripted_runs import (
    POLICIES,
    SHAPE,
    TinyModel,
    assert_same_run,
    euler,
    first_bucket,
    scripted_plan,
)
from torch import Tensor

from ddit_rt.loop import CpuExecutor, CudaExecutor, Executor, RunPlan, RunTrace
from ddit_rt.planning.plan import plan_passes, plan_run
from ddit_rt.policies import FinePolicy, FirstBlockCache, PatchPolicy, StaticPolicy
from ddit_rt.solver import own_steps
from ddit_rt.steps import StepInputs

STEPS = 12


def scheduled(steps: int = STEPS) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    return scheduler


def by_scheduler(
    executor: Executor,
    plan: RunPlan,
    latents: Tensor,
    change: Callable[[int, Tensor], Tensor] | None = None,
    before: Callable[[Any, int, int], None] | None = None,
) -> tuple[Tensor, RunTrace]:
    """A loop around a session; `change` is a callback, `before` acts on a decided step."""
    scheduler = scheduled(plan.policy.steps)
    session = executor.open(plan, latents, driver="test")
    for step, timestep in enumerate(scheduler.timesteps):
        branch = session.decide(step, latents)
        if before is not None:
            before(session, step, branch)
        velocity = session.velocity(plan.stages[step], branch, latents)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        session.end_step()
        if change is not None:
            latents = change(step, latents)
    return latents, session.close(cancelled=False)


def own_plan(policy: PatchPolicy, *, seed: int = 0) -> RunPlan:
    return scripted_plan(policy, own_steps(scheduled()), seed=seed)


@pytest.mark.parametrize("policy", POLICIES, ids=["ddit", "dwell", "static"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_schedulers_own_steps_are_those_of_its_table(
    graphs: EmulatedGraphs, policy: PatchPolicy, device: str
) -> None:
    expected = CpuExecutor().run(scripted_plan(policy, euler(STEPS)), noise(*SHAPE))
    executor = CpuExecutor() if device == "cpu" else CudaExecutor(graphs)
    actual = by_scheduler(executor, own_plan(policy), noise(*SHAPE))
    assert actual[1].executor == f"test-{device}"
    assert len(set(actual[1].patch_sizes())) > 1
    assert_same_run(actual, expected)


def test_changed_latents_are_scored_alike_on_both(graphs: EmulatedGraphs) -> None:
    """A device measures the patches where latents enter, so after a callback has changed them."""

    def change(step: int, latents: Tensor) -> Tensor:
        return latents * 0.5 if step == 5 else latents

    policy = POLICIES[0]
    actual = by_scheduler(CudaExecutor(graphs), own_plan(policy), noise(*SHAPE), change)
    assert_same_run(actual, by_scheduler(CpuExecutor(), own_plan(policy), noise(*SHAPE), change))
    untouched = by_scheduler(CpuExecutor(), own_plan(policy), noise(*SHAPE))[1]
    assert actual[1][5].scores == pytest.approx(untouched[5].scores, rel=5e-6)
    assert actual[1][6].scores["2p"] > 2 * untouched[6].scores["2p"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_latents_for_the_model_may_be_others_than_those_compared(
    graphs: EmulatedGraphs, device: str
) -> None:
    """The history keeps those that entered."""
    executor = CpuExecutor() if device == "cpu" else CudaExecutor(graphs)
    traces = []
    for offset in (0.0, 1.0):
        latents, session = (
            noise(*SHAPE),
            executor.open(own_plan(POLICIES[0]), noise(*SHAPE), driver=""),
        )
        for step in range(STEPS):
            branch = session.decide(step, latents)
            for _ in range(2):
                session.velocity(0, branch, latents + offset)
            session.end_step()
            latents = latents * 0.7
        traces.append(session.close(cancelled=False))
    scores = [record.scores for record in traces[0]]
    assert scores == [record.scores for record in traces[1]]
    assert len(scores) == STEPS
    assert any(scores)


def test_a_session_and_a_run_share_what_is_captured(graphs: EmulatedGraphs) -> None:
    model, executor = TinyModel(), CudaExecutor(graphs)
    policy, own = StaticPolicy("2p:0.5,p"), own_steps(scheduled(10))
    executor.run(model.plan(policy), noise(*SHAPE))
    captured = list(graphs.captured)
    plan = plan_run(
        model.compiled,
        model.outline(policy, solver=own),
        model.conditioning(seed=2),
    )
    actual = by_scheduler(executor, plan, noise(*SHAPE))
    assert graphs.captured == captured
    assert_same_run(actual, CpuExecutor().run(model.plan(policy, seed=2), noise(*SHAPE)))
    again = executor.run(model.plan(policy), noise(*SHAPE))
    assert_same_run(again, CpuExecutor().run(model.plan(policy), noise(*SHAPE)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("policy", [FinePolicy(), StaticPolicy("4p:0.5,p")], ids=["fine", "coarse"])
def test_tables_written_between_steps_reach_the_buckets(
    graphs: EmulatedGraphs, device: str, policy: PatchPolicy
) -> None:
    """Another run's prompt, times and noise levels: as if the run had been planned with them."""
    model, executor = TinyModel(), CpuExecutor() if device == "cpu" else CudaExecutor(graphs)
    other = model.conditioning(seed=2)
    scheduler = scheduled(10)
    stale = replace(own_steps(scheduler), sigmas=tuple(torch.linspace(0.9, 0.1, 11).tolist()))
    outline = model.outline(policy, solver=stale)
    outline = replace(outline, timesteps=outline.timesteps.flip(0))

    def refresh(session: Any, step: int, branch: int) -> None:
        inputs = StepInputs(
            sigma=scheduler.sigmas[step],
            timestep=scheduler.timesteps[step : step + 1] / 1000,
            conditioning=other,
        )
        session.bucket(0, branch).refresh(step, inputs)

    plan = plan_run(model.compiled, outline, model.conditioning(seed=1))
    actual = by_scheduler(executor, plan, noise(*SHAPE), before=refresh)
    expected = CpuExecutor().run(model.plan(policy, seed=2), noise(*SHAPE))
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-5)


def test_a_first_block_runs_again_where_its_inputs_changed_after_the_decision(
    graphs: EmulatedGraphs,
) -> None:
    model, other = TinyModel(), TinyModel().conditioning(seed=2)

    def refresh(session: Any, step: int, branch: int) -> None:
        if step == 6:
            scheduler = scheduled()
            inputs = StepInputs(
                sigma=scheduler.sigmas[step],
                timestep=scheduler.timesteps[step : step + 1] / 1000,
                conditioning=other,
            )
            session.bucket(0, branch % 3).refresh(step, inputs)

    def run(executor: Executor, before: Any = None) -> tuple[Tensor, RunTrace]:
        outline = model.outline(
            FinePolicy(), FirstBlockCache(0.5), steps=STEPS, solver=own_steps(scheduled())
        )
        plan = plan_passes(model.compiled, outline, [model.conditioning()])
        return by_scheduler(executor, plan, noise(*SHAPE), before=before)

    plain, changed = run(CpuExecutor()), run(CpuExecutor(), refresh)
    assert changed[1].reused > 2
    assert not torch.equal(plain[0], changed[0])
    executor = CudaExecutor(graphs)
    assert_same_run(run(executor, refresh), changed)
    assert_same_run(run(executor), plain)


def test_forced_steps_wait_for_nothing(graphs: EmulatedGraphs) -> None:
    """Their branch is known, so that the host may run ahead of the device."""
    executor = CudaExecutor(graphs)
    by_scheduler(executor, own_plan(FinePolicy()), noise(*SHAPE))
    graphs.runtime.clear_calls()
    session = executor.open(own_plan(FinePolicy()), noise(*SHAPE), driver="test")
    for step in range(STEPS):
        session.velocity(0, session.decide(step, noise(*SHAPE)), noise(*SHAPE))
    assert set(graphs.runtime.calls()) <= {"cudaLaunchKernel", "cudaEventRecord"}
    session.close(cancelled=False)


def test_a_session_that_ends_early_leaves_the_executor_usable(graphs: EmulatedGraphs) -> None:
    executor, plan = CudaExecutor(graphs), own_plan(POLICIES[0])
    session = executor.open(plan, noise(*SHAPE), driver="test")
    for step in range(3):
        session.velocity(0, session.decide(step, noise(*SHAPE)), noise(*SHAPE))
        session.end_step()
    session.decide(3, noise(*SHAPE))
    trace = session.close(cancelled=True)
    assert len(trace) == 3
    assert trace.cancelled
    expected = by_scheduler(CpuExecutor(), plan, noise(*SHAPE))
    assert_same_run(by_scheduler(executor, plan, noise(*SHAPE)), expected)


def test_a_bucket_that_fails_does_not_lose_the_session(graphs: EmulatedGraphs) -> None:
    plan = own_plan(FinePolicy())
    bucket = first_bucket(plan)
    executor = CudaExecutor(graphs)
    session = executor.open(plan, noise(*SHAPE), driver="test")
    session.decide(0, noise(*SHAPE))
    bucket.before = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        session.velocity(0, 0, noise(*SHAPE))
    assert session.close(cancelled=True).cancelled
    bucket.before = None
    expected = by_scheduler(CpuExecutor(), plan, noise(*SHAPE))
    assert_same_run(by_scheduler(executor, plan, noise(*SHAPE)), expected)
