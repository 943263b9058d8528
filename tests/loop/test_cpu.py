"""The step loop: decisions, history, and what it must never do."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from models import noise
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ddit_rt.loop import CpuExecutor, RunPlan, RunTrace
from ddit_rt.policies import DDiTPolicy, FinePolicy, PatchPolicy, Schedule, StaticPolicy
from ddit_rt.solver import SolverTable, probe_scheduler, replay
from ddit_rt.steps import at_step

SHAPE = (1, 4, 16, 16)


class ScriptedBucket:
    """Velocities fixed beforehand, and a log of the steps that asked for one."""

    def __init__(self, multiple: int, velocities: list[Tensor], log: list[tuple[int, int]]) -> None:
        self.multiple = multiple
        self.tokens = 64 // multiple**2
        self._velocities = torch.stack(velocities)
        self._log = log

    def velocity(
        self, latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = True
    ) -> Tensor:
        self._log.append((len(self._log), self.multiple))
        return at_step(self._velocities, step)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self._velocities,)


def euler(steps: int) -> SolverTable:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return probe_scheduler(scheduler)


def scripted_plan(
    policy: PatchPolicy, velocities: list[Tensor], solver: SolverTable
) -> tuple[RunPlan, list[tuple[int, int]]]:
    log: list[tuple[int, int]] = []
    offered = (1, 2, 4)
    plan = RunPlan(
        buckets=[[ScriptedBucket(multiple, velocities, log) for multiple in offered]],
        stages=(0,) * solver.steps,
        stage_names=("",),
        offered=offered,
        policy=policy.resolve(Schedule(sigmas=solver.sigmas, offered=offered)),
        solver=solver,
        patch_size=2,
        capacity=solver.steps,
    )
    return plan, log


def random_velocities(steps: int, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    return [noise(*shape, seed=10 + step) for step in range(steps)]


@pytest.mark.parametrize("kind", ["euler", "unipc"])
def test_latents_follow_the_solver_table(kind: str) -> None:
    steps = 12
    if kind == "euler":
        solver = euler(steps)
    else:
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        scheduler.set_timesteps(steps)
        solver = probe_scheduler(scheduler)
    velocities = random_velocities(steps)
    start = noise(*SHAPE)
    plan, _ = scripted_plan(StaticPolicy("2p:0.5,p"), velocities, solver)
    final, _ = CpuExecutor().run(plan, start)
    values = torch.stack([start, *velocities]).flatten(1).double()
    expected = replay(solver, values)[-1].reshape(SHAPE)
    # fp32 against fp64: some 20 roundings of values of order 10.
    torch.testing.assert_close(final.double(), expected, rtol=0, atol=2e-5)


def test_a_watch_of_velocities_sees_every_step() -> None:
    velocities, solver = random_velocities(5), euler(5)
    plan, _ = scripted_plan(FinePolicy(), velocities, solver)
    seen: list[tuple[int, Tensor, Tensor]] = []
    start = noise(*SHAPE)
    final, _ = CpuExecutor().run(
        plan, start, on_velocity=lambda step, z, v: seen.append((step, z.clone(), v))
    )
    assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[0][1], start)
    for (step, z, v), after in zip(seen, [*(z for _, z, _ in seen[1:]), final], strict=True):
        assert torch.equal(v, velocities[step])
        expected = z + (solver.sigmas[step + 1] - solver.sigmas[step]) * v
        torch.testing.assert_close(after, expected)


def test_static_plan_runs_its_buckets_in_order() -> None:
    plan, log = scripted_plan(StaticPolicy(["4p", "4p", "2p", "p"]), random_velocities(4), euler(4))
    _, trace = CpuExecutor().run(plan, noise(*SHAPE))
    assert log == [(0, 4), (1, 4), (2, 2), (3, 1)]
    assert trace.patch_sizes() == ["4p", "4p", "2p", "p"]
    assert [record.tokens for record in trace] == [4, 4, 16, 64]
    assert {record.reason for record in trace} == {"static plan"}
    assert all(record.scores == {} for record in trace)


def third_difference_score(latents: list[Tensor], patch: int, rho: float) -> float:
    """The paper's rule, written out with torch alone, on latents oldest first."""
    z3, z2, z1, z0 = latents[-4:]
    difference = z0 - 3 * z1 + 3 * z2 - z3
    batch, channels, height, width = difference.shape
    patches = difference.reshape(
        batch, channels, height // patch, patch, width // patch, patch
    ).permute(0, 2, 4, 1, 3, 5)
    deviation = patches.reshape(batch, -1, channels * patch * patch).std(dim=-1)
    return float(torch.quantile(deviation, rho, dim=1).max())


def test_dynamic_scores_equal_the_papers_rule() -> None:
    steps, solver = 10, euler(10)
    velocities = random_velocities(steps)
    start = noise(*SHAPE)
    plan, _ = scripted_plan(DDiTPolicy.paper(tau=0.25), velocities, solver)
    _, trace = CpuExecutor().run(plan, start)
    values = torch.stack([start, *velocities]).flatten(1).double()
    latents = [z.reshape(SHAPE) for z in replay(solver, values)]
    for record in list(trace)[3:]:
        for name, patch in (("2p", 4), ("4p", 8)):
            expected = third_difference_score(latents[: record.step + 1], patch, 0.4)
            assert record.scores[name] == pytest.approx(expected, rel=1e-4)
        below = [name for name in ("2p", "4p") if record.scores[name] < 0.25]
        assert record.patch_size == (below[-1] if below else "p")


def test_straight_trajectory_goes_coarsest() -> None:
    """A constant velocity on a uniform schedule has no third difference at all."""
    steps = 8
    velocity = noise(*SHAPE, seed=5)
    plan, _ = scripted_plan(
        DDiTPolicy(tau=1e-4, warmup="coarse", refresh=None), [velocity] * steps, euler(steps)
    )
    _, trace = CpuExecutor().run(plan, noise(*SHAPE))
    assert trace.patch_sizes() == ["4p"] * 6 + ["p"] * 2
    assert trace[4].reason == "score below threshold"


def test_batch_is_as_fine_as_its_most_demanding_sample() -> None:
    steps = 8
    smooth = noise(1, 4, 16, 16, seed=5)
    rough = [noise(1, 4, 16, 16, seed=20 + step) for step in range(steps)]
    velocities = [torch.cat([smooth, r]) for r in rough]
    plan, _ = scripted_plan(DDiTPolicy(tau=1e-3), velocities, euler(steps))
    _, trace = CpuExecutor().run(plan, noise(2, 4, 16, 16))
    assert trace.patch_sizes()[3:] == ["p"] * 5


def test_nan_falls_back_to_the_base_patch_and_is_reported() -> None:
    steps = 8
    velocities = random_velocities(steps)
    velocities[4] = torch.full(SHAPE, math.nan)
    plan, _ = scripted_plan(
        DDiTPolicy(tau=1e9, warmup="coarse", refresh=None, fine_tail=0), velocities, euler(steps)
    )
    _, trace = CpuExecutor().run(plan, noise(*SHAPE))
    assert trace.patch_sizes() == ["4p"] * 5 + ["p"] * 3
    assert trace[5].reason == "score not finite: base patch"
    assert trace.nonfinite


def test_runs_share_no_state() -> None:
    velocities = random_velocities(9)
    plan, _ = scripted_plan(DDiTPolicy(tau=0.5), velocities, euler(9))
    executor = CpuExecutor()
    first, first_trace = executor.run(plan, noise(*SHAPE))
    executor.run(plan, noise(*SHAPE, seed=99) * 50)
    again, again_trace = executor.run(plan, noise(*SHAPE))
    assert torch.equal(first, again)
    assert [r.scores for r in first_trace] == [r.scores for r in again_trace]


def test_stop_ends_between_two_steps() -> None:
    plan, log = scripted_plan(StaticPolicy("p"), random_velocities(6), euler(6))
    _, trace = CpuExecutor().run(plan, noise(*SHAPE), should_stop=lambda: len(log) >= 2)
    assert len(trace) == 2
    assert trace.cancelled


def test_input_latents_are_not_written_to() -> None:
    start = noise(*SHAPE)
    plan, _ = scripted_plan(StaticPolicy("p"), random_velocities(3), euler(3))
    CpuExecutor().run(plan, start)
    assert torch.equal(start, noise(*SHAPE))


@pytest.mark.parametrize("annotate", [False, True])
def test_profilers_see_ranges_only_when_asked(annotate: bool) -> None:
    plan, _ = scripted_plan(StaticPolicy(["4p", "p"]), random_velocities(2), euler(2))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        CpuExecutor().run(plan, noise(*SHAPE), annotate=annotate)
    events = [event for event in profiler.events() if event.name.startswith("ddit_rt/")]
    events.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    names = " ".join(event.name.removeprefix("ddit_rt/") for event in events)
    expected = "run step/0 decide model/4p solver step/1 decide model/p solver"
    assert names == (expected if annotate else "")
    parents = {event.name: event.cpu_parent.name for event in events[1:]}
    assert set(parents.values()) <= {"ddit_rt/run", "ddit_rt/step/0", "ddit_rt/step/1"}
    if annotate:
        assert parents["ddit_rt/step/1"] == "ddit_rt/run"
        assert parents["ddit_rt/model/4p"] == "ddit_rt/step/0"
        assert parents["ddit_rt/solver"] == "ddit_rt/step/1"


class OpCounter(TorchDispatchMode):
    """Counts every op, so that a host read cannot hide."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def count_ops(steps: int) -> Counter[str]:
    plan, _ = scripted_plan(DDiTPolicy(tau=0.5), random_velocities(steps), euler(steps))
    start = noise(*SHAPE)
    with OpCounter() as counter:
        CpuExecutor().run(plan, start)
    return counter.calls


def test_step_loop_reads_one_value_per_step() -> None:
    """`.item()`, `int()`, `bool()` and `if tensor` all end in `_local_scalar_dense`."""
    short, long = count_ops(8), count_ops(18)
    reads = "aten._local_scalar_dense"
    assert long[reads] - short[reads] == 10, "one host read per step: the decided bucket"
    for forbidden in ("aten.nonzero", "aten.equal", "aten.is_nonzero"):
        assert long[forbidden] == short[forbidden]


def test_trace_is_strict_json_and_prints() -> None:
    import json

    steps = 8
    velocities = random_velocities(steps)
    velocities[4] = torch.full(SHAPE, math.nan)
    plan, _ = scripted_plan(DDiTPolicy(), velocities, euler(steps))
    _, trace = CpuExecutor().run(plan, noise(*SHAPE))
    assert isinstance(trace, RunTrace)
    data = json.loads(json.dumps(trace.to_dict(), allow_nan=False))
    assert len(data["steps"]) == steps
    assert data["tokens"] == sum(step["tokens"] for step in data["steps"])
    assert "warm-up" in str(trace)
