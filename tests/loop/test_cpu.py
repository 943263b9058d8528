"""The step loop: decisions, history, and what it must never do."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
from models import noise
from scripted_runs import SHAPE, euler, scripted_plan, unipc
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ddit_rt.loop import CpuExecutor, RunPlan
from ddit_rt.policies import DDiTPolicy, FinePolicy, PatchPolicy, StaticPolicy
from ddit_rt.solver import SolverTable, replay


def random_velocities(steps: int) -> Tensor:
    return torch.stack([noise(*SHAPE, seed=10 + step) for step in range(steps)])


def plan_of(policy: PatchPolicy, velocities: Tensor, solver: SolverTable | None = None) -> RunPlan:
    return scripted_plan(policy, solver or euler(len(velocities)), velocities=velocities)


@pytest.mark.parametrize("solver", [euler(12), unipc(12)], ids=["euler", "unipc"])
def test_latents_follow_the_solver_table_and_the_plan(solver: SolverTable) -> None:
    start, velocities = noise(*SHAPE), random_velocities(12)
    sizes = [4, 4, 2, 2, 2, 4, 1, 1, 2, 1, 1, 1]
    final, trace = CpuExecutor().run(plan_of(StaticPolicy(sizes), velocities, solver), start)
    ran = velocities / torch.tensor(sizes).reshape(-1, 1, 1, 1, 1)
    values = torch.cat([start[None], ran]).flatten(1).double()
    expected = replay(solver, values)[-1].reshape(SHAPE)
    # fp32 against fp64: some 20 roundings of values of order 10.
    torch.testing.assert_close(final.double(), expected, rtol=0, atol=2e-5)
    assert trace.patch_sizes() == ["p" if size == 1 else f"{size}p" for size in sizes]
    assert [record.tokens for record in trace] == [64 // size**2 for size in sizes]
    assert {record.reason for record in trace} == {"static plan"}
    assert all(record.scores == {} for record in trace)


def test_a_watch_of_velocities_sees_every_step() -> None:
    velocities, solver = random_velocities(5), euler(5)
    seen: list[tuple[int, Tensor, Tensor]] = []
    start = noise(*SHAPE)
    final, _ = CpuExecutor().run(
        plan_of(FinePolicy(), velocities),
        start,
        on_velocity=lambda step, z, v: seen.append((step, z.clone(), v)),
    )
    assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[0][1], start)
    for (step, z, v), after in zip(seen, [*(z for _, z, _ in seen[1:]), final], strict=True):
        assert torch.equal(v, velocities[step])
        expected = z + (solver.sigmas[step + 1] - solver.sigmas[step]) * v
        torch.testing.assert_close(after, expected)


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
    solver, velocities, start = euler(10), random_velocities(10), noise(*SHAPE)
    _, trace = CpuExecutor().run(plan_of(DDiTPolicy.paper(tau=0.25), velocities), start)
    ran = [
        v / float(r.patch_size.removesuffix("p") or 1)
        for v, r in zip(velocities, trace, strict=True)
    ]
    values = torch.stack([start, *ran]).flatten(1).double()
    latents = [z.reshape(SHAPE) for z in replay(solver, values)]
    for record in list(trace)[3:]:
        for name, patch in (("2p", 4), ("4p", 8)):
            expected = third_difference_score(latents[: record.step + 1], patch, 0.4)
            assert record.scores[name] == pytest.approx(expected, rel=1e-4)
        below = [name for name in ("2p", "4p") if record.scores[name] < 0.25]
        assert record.patch_size == (below[-1] if below else "p")


def test_straight_trajectory_goes_coarsest() -> None:
    """A constant velocity on a uniform schedule has no third difference at all."""
    policy = DDiTPolicy(tau=1e-4, warmup="coarse", refresh=None)
    velocities = noise(*SHAPE, seed=5).expand(8, *SHAPE)
    _, trace = CpuExecutor().run(plan_of(policy, velocities), noise(*SHAPE))
    assert trace.patch_sizes() == ["4p"] * 6 + ["p"] * 2
    assert trace[4].reason == "score below threshold"


def test_batch_is_as_fine_as_its_most_demanding_sample() -> None:
    smooth = noise(*SHAPE, seed=5)
    velocities = torch.stack([torch.cat([smooth, rough]) for rough in random_velocities(8)])
    _, trace = CpuExecutor().run(plan_of(DDiTPolicy(tau=1e-3), velocities), noise(2, 4, 16, 16))
    assert trace.patch_sizes()[3:] == ["p"] * 5


def test_nan_falls_back_to_the_base_patch_and_is_reported() -> None:
    velocities = random_velocities(8)
    velocities[4] = math.nan
    policy = DDiTPolicy(tau=1e9, warmup="coarse", refresh=None, fine_tail=0)
    _, trace = CpuExecutor().run(plan_of(policy, velocities), noise(*SHAPE))
    assert trace.patch_sizes() == ["4p"] * 5 + ["p"] * 3
    assert trace[5].reason == "score not finite: base patch"
    assert trace.nonfinite
    data = json.loads(json.dumps(trace.to_dict(), allow_nan=False))
    assert len(data["steps"]) == 8
    assert data["tokens"] == sum(step["tokens"] for step in data["steps"])
    assert "warm-up" in str(trace)


def test_runs_share_no_state() -> None:
    plan, executor = plan_of(DDiTPolicy(tau=0.5), random_velocities(9)), CpuExecutor()
    first, first_trace = executor.run(plan, noise(*SHAPE))
    executor.run(plan, noise(*SHAPE, seed=99) * 50)
    again, again_trace = executor.run(plan, noise(*SHAPE))
    assert torch.equal(first, again)
    assert [r.scores for r in first_trace] == [r.scores for r in again_trace]


def test_stop_ends_between_two_steps() -> None:
    asked = iter([False, False, True])
    plan = plan_of(StaticPolicy("p"), random_velocities(6))
    _, trace = CpuExecutor().run(plan, noise(*SHAPE), should_stop=lambda: next(asked))
    assert len(trace) == 2
    assert trace.cancelled


def test_input_latents_are_not_written_to() -> None:
    start = noise(*SHAPE)
    CpuExecutor().run(plan_of(StaticPolicy("p"), random_velocities(3)), start)
    assert torch.equal(start, noise(*SHAPE))


@pytest.mark.parametrize("annotate", [False, True])
def test_profilers_see_ranges_only_when_asked(annotate: bool) -> None:
    plan = plan_of(StaticPolicy(["4p", "p"]), random_velocities(2))
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
    plan, start = plan_of(DDiTPolicy(tau=0.5), random_velocities(steps)), noise(*SHAPE)
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
