"""The decide kernel's policy against the CPU op, its trace, and that order changes no bit."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from step_loop import LoopPlan, StepLoop, emulated_run, euler, mixed_run, plan_of

from ddit_rt import ops
from ddit_rt.ops import Reason

POLICY_WORDS = slice(4, 8)  # of the loop's state: those that decide_ keeps


def random_policy_plan(steps: int, *, dwell: int, monotone: bool) -> LoopPlan:
    thresholds = 1.5 * torch.rand(steps, 3)
    thresholds[torch.rand(steps, 3) < 0.1] = math.nan
    forced = torch.where(torch.rand(steps) < 0.1, torch.randint(0, 4, (steps,)), -1)
    changes = {"forced": forced.tolist(), "thresholds": thresholds}
    return plan_of(
        (2, 2, 1, 4, 4), (1, 2, 4), euler(steps), dwell=dwell, monotone=monotone, **changes
    )


@pytest.mark.parametrize(
    ("dwell", "monotone"), [(0, False), (3, False), (0, True), (4, True), (1, False)]
)
def test_policy_equals_the_cpu_op_over_random_runs(
    runtime: ModuleType, dwell: int, monotone: bool
) -> None:
    """Fed with the kernel's own scores, the op must reach the same state and the same row."""
    steps = 40
    plan = random_policy_plan(steps, dwell=dwell, monotone=monotone)
    loop = StepLoop(runtime, plan)
    loop.load(plan, torch.zeros(plan.shape))
    state = torch.tensor([-1, 0, 0, 0], dtype=torch.int32)
    record = torch.zeros(steps, 6)
    loop.control.begin(0)
    for k in range(steps):
        moments = torch.rand(2, 2 * 16)  # means, sums of squared deviations
        moments[1, torch.rand(2 * 16) < 0.002] = math.nan
        loop["moments"].copy_(moments.flatten())
        loop["scores"].fill_(math.nan)
        loop.control.decide(0)
        ops.decide_(
            loop["scores"], loop["forced"], plan.thresholds, state, record, k, dwell, monotone
        )
        assert torch.equal(loop["state"][POLICY_WORDS], state)
        assert int(loop["state"][0]) == k
    loop.control.finish(0)
    torch.testing.assert_close(loop.record(), record, rtol=0, atol=0, equal_nan=True)
    met = {Reason(int(reason)) for reason in record[:, 1]}
    wanted = {Reason.FORCED, Reason.BELOW, Reason.ABOVE}
    wanted |= {Reason.MONOTONE} if monotone else set()
    wanted |= {Reason.DWELL} if dwell > 1 else set()
    assert met >= (wanted - {Reason.BELOW} if monotone else wanted)
    assert loop.control.progress().nonfinite == bool(state[2])


def test_a_forced_bucket_that_does_not_exist_is_the_base(runtime: ModuleType) -> None:
    plan = random_policy_plan(4, dwell=0, monotone=False)
    loop = StepLoop(runtime, plan)
    loop.load(plan, torch.zeros(plan.shape))
    loop["forced"].copy_(torch.tensor([3, 4, -2, 2], dtype=torch.int32))
    loop.run_host(4, lambda _: loop["velocity"].zero_())
    assert loop.record()[:, 0].tolist() == [3, 0, 0, 2]
    assert (loop.record()[:, 1] == Reason.FORCED).all()


@pytest.mark.parametrize("forced", [[0, 0], [-1, -1]])
def test_without_candidate_sizes_every_step_is_at_the_base(
    runtime: ModuleType, forced: list[int]
) -> None:
    plan = plan_of((1, 1, 1, 4, 4), (), euler(2), forced=forced)
    loop = StepLoop(runtime, plan)
    loop.load(plan, torch.zeros(plan.shape))
    loop.run_host(2, lambda _: loop["velocity"].zero_())
    reason = Reason.FORCED if forced[0] == 0 else Reason.ABOVE
    assert loop.record().tolist() == [[0, reason, 1], [0, reason, 2]]
    assert not loop.control.progress().nonfinite


def test_the_same_bits_whatever_the_order_of_blocks_and_threads(runtime: ModuleType) -> None:
    run = mixed_run((2, 4, 2, 16, 40))
    runs = []
    for seed in (0, 0, 1, 2, 3):
        runtime.set_order(seed)
        _, loop, buckets = emulated_run(runtime, run)
        loop.run_host(run.plan.steps, buckets.replay)
        runs.append(loop.bits())
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])


def test_trace_rows_come_one_by_one_and_stay(runtime: ModuleType) -> None:
    run = mixed_run()
    plan, expected = run.plan, run.cpu
    loop = StepLoop(runtime, plan, capacity=20)
    control = loop.control
    loop.load(plan, expected.latents[0])
    assert control.records() == []
    control.begin(0)
    for k in range(plan.steps):
        assert len(control.records()) == control.progress().decided == k
        control.decide(0)
        assert control.bucket(k) == expected.buckets[k]
        loop["velocity"].copy_(expected.velocities[k])
        control.update(0)
    assert not control.progress().finished
    control.finish(0)
    assert control.progress().finished
    assert not control.progress().cancelled
    times = [time_ns for time_ns, _ in control.records()]
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] <= control.end_ns()
    # Scores differ from the CPU op's by a few units in the last place; all else is exact.
    record = loop.record()
    torch.testing.assert_close(record, expected.record, rtol=2e-6, atol=0.0, equal_nan=True)
    assert torch.equal(record[:, :3], expected.record[:, :3])
