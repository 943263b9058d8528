"""The step cache on the device: against the CPU op, in every form, and its graphs."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from step_loop import (
    EmulatedBuckets,
    MixedRun,
    RandomModel,
    StepLoop,
    emulated_run,
    euler,
    mixed_run,
    plan_of,
    run_cpu,
    run_form,
)

from ddit_rt import ops
from ddit_rt.ops import CacheGrowth, CacheReason
from ddit_rt.policies import CacheTable

FORMS = ["loop", "step", "host"]


def cached_run(cache: CacheTable, *, seed: int = 0, **changes: Any) -> MixedRun:
    """A run at changing sizes under a step cache; signals, if any, are random."""
    run = mixed_run(steps=12)
    torch.manual_seed(seed)
    signals = torch.rand(12, 3) if cache.coefficients else None
    plan = replace(run.plan, cache=cache, signals=signals, **changes)
    model = RandomModel(plan)
    cpu = run_cpu(plan, run.cpu.latents[0], model)
    return MixedRun(plan=plan, model=model, cpu=cpu)


def tea(threshold: float, steps: int = 12) -> CacheTable:
    increments = (math.nan, *[0.0] * (steps - 2), math.nan)
    return CacheTable(increments=increments, threshold=threshold, coefficients=(0.5, -0.1, 0.2))


def mag(limit: int = 2) -> CacheTable:
    ratios = (0.97, 1.05, 0.99, 1.1, 0.9, 1.0, 1.02, 0.95, 1.03, 0.98)
    increments = (math.nan, math.nan, *ratios)
    return CacheTable(increments=increments, threshold=0.2, limit=limit, growth=CacheGrowth.PRODUCT)


CACHES = {"tea": tea(0.8), "table": replace(tea(0.3), coefficients=()), "mag": mag()}
ONE_SIZE = {"forced": [1] * 12}


class CachedLoop:
    """A loop, its buckets, and the graph that makes its signal."""

    def __init__(self, runtime: ModuleType, run: MixedRun) -> None:
        self.run = run
        self.loop = StepLoop(runtime, run.plan, capacity=16)
        self.buckets = EmulatedBuckets(self.loop, run.model, run.plan.branches)
        self.signal = runtime.call_graph(self.measure) if run.plan.signals is not None else 0

    def measure(self) -> None:
        step = min(int(self.loop["state"][0]) + 1, self.run.plan.steps - 1)
        assert self.run.plan.signals is not None
        self.loop["signal"].copy_(self.run.plan.signals[step])

    def start(self, form: str) -> dict[str, torch.Tensor]:
        run, loop = self.run, self.loop
        loop.load(run.plan, run.cpu.latents[0])
        if form != "host":
            run_form(loop, form, self.buckets, run.plan.steps, signal=self.signal)
            return loop.bits()
        loop.control.begin(0)
        for step in range(run.plan.steps):
            if self.signal:
                self.measure()
            loop.control.decide(0)
            self.buckets.replay(loop.control.branch(step))
            loop.control.update(0)
        loop.control.finish(0)
        return loop.bits()


@pytest.mark.parametrize("changes", [{}, ONE_SIZE], ids=["sizes", "one size"])
@pytest.mark.parametrize("name", CACHES)
def test_all_forms_equal_the_cpu_ops(
    runtime: ModuleType, name: str, changes: dict[str, Any]
) -> None:
    run = cached_run(CACHES[name], **changes)
    reasons = {CacheReason(int(reason)) for reason in run.cpu.cache_record[:, 0]}
    assert {CacheReason.FORCED, CacheReason.REUSED} <= reasons
    results = []
    for form in FORMS:
        cached = CachedLoop(runtime, run)
        results.append(cached.start(form))
        assert cached.buckets.log == list(enumerate(run.cpu.branches))
        records = torch.tensor(cached.loop.control.cache_records())
        torch.testing.assert_close(
            records, run.cpu.cache_record, rtol=0, atol=0, equal_nan=True, check_dtype=False
        )
    assert torch.equal(results[0]["latents"], run.cpu.latents[-1].view(torch.int32))
    for other in results[1:]:
        assert all(torch.equal(results[0][key], other[key]) for key in other)


def test_the_cases_above_meet_every_reason() -> None:
    runs = [cached_run(cache, **more) for cache in CACHES.values() for more in ({}, ONE_SIZE)]
    reasons = {CacheReason(int(r)) for run in runs for r in run.cpu.cache_record[:, 0]}
    wanted = set(CacheReason) - {CacheReason.OFF, CacheReason.NONFINITE}
    assert reasons == wanted


@pytest.mark.parametrize("growth", list(CacheGrowth))
@pytest.mark.parametrize("terms", [0, 1, 4, 7])
def test_the_decision_equals_the_cpu_op_over_random_runs(
    runtime: ModuleType, growth: CacheGrowth, terms: int
) -> None:
    """Sums of signals that are not finite in places, at sizes that change, to the bit."""
    steps = 60
    increments = 0.8 + 0.4 * torch.rand(steps)
    increments[torch.rand(steps) < 0.1] = math.nan
    increments[0], increments[55] = math.nan, 1.0
    cache = CacheTable(
        increments=tuple(increments.tolist()),
        threshold=1.5,
        limit=3,
        growth=growth,
        coefficients=tuple((torch.rand(terms) - 0.3).tolist()),
    )
    forced = torch.randint(0, 3, (steps // 6,)).repeat_interleave(6).tolist()
    signals = torch.rand(steps, 2)
    plan = plan_of(
        (2, 2, 1, 4, 4), (2, 4), euler(steps), forced=forced, cache=cache, signals=signals
    )
    signals[55, 1] = math.inf
    loop = StepLoop(runtime, plan)
    loop.load(plan, torch.zeros(plan.shape))
    state = torch.tensor([-1, 0, 0, 0], dtype=torch.int32)
    memory, record, rows = torch.zeros(4), torch.zeros(steps, 5), torch.zeros(steps, 2)
    table, coefficients = cache.tensors()
    loop.control.begin(0)
    for k in range(steps):
        loop["signal"].copy_(signals[k])
        loop.control.decide(0)
        ops.decide_(torch.empty(2, 0), loop["forced"], plan.thresholds, state, record, k, 0, False)
        ops.decide_reuse_(
            signals[k], table, coefficients, state, memory, rows, k, 3,
            cache.threshold, cache.limit, growth,
        )  # fmt: skip
        assert torch.equal(loop["state"][4:8], state)
        assert torch.equal(loop["cache"], memory)
        assert loop.control.branch(k) == int(state[3])
        assert loop.control.bucket(k) == int(state[0])
    loop.control.finish(0)
    found = torch.tensor(loop.control.cache_records())
    torch.testing.assert_close(found, rows, rtol=0, atol=0, equal_nan=True, check_dtype=False)
    assert loop.control.progress().nonfinite == (terms > 0)
    assert (rows[:, 0] == CacheReason.REUSED).any()


def test_a_second_run_knows_nothing_of_the_first(runtime: ModuleType) -> None:
    run = cached_run(CACHES["tea"])
    cached = CachedLoop(runtime, run)
    first = cached.start("loop")
    cached.loop["cache"].fill_(math.nan)
    cached.loop["signal"].fill_(math.nan)
    again = cached.start("loop")
    assert all(torch.equal(first[name], again[name]) for name in first)


STEP = """\
child
  model
decide < child
SWITCH < decide
  body 0
    child
      model
  body 1
    empty
  body 2
    child
      model
  body 3
    empty
update<float32, 4> < SWITCH"""


def test_topology_with_a_signal_and_buckets_that_reuse(runtime: ModuleType) -> None:
    loop = StepLoop(runtime, plan_of(cache=tea(1.0, steps=3)))
    graphs = [runtime.call_graph(lambda: None), 0, runtime.call_graph(lambda: None), 0]
    named = list(zip(["p", "2p", "p reused", "2p reused"], graphs, strict=True))
    signal = runtime.call_graph(lambda: None)
    graph = runtime.StepGraph(loop.control, named, "step", owner=None, signal=signal)
    assert runtime.describe() == STEP.splitlines()
    del graph


def test_a_number_of_graphs_that_leaves_a_decision_without_one_is_refused(
    runtime: ModuleType,
) -> None:
    loop = StepLoop(runtime, plan_of(cache=tea(1.0, steps=3)))
    good = runtime.typed_graph(0, 1)
    with pytest.raises(ValueError, match="2 buckets, expected 4: .* once more without its blocks"):
        runtime.StepGraph(loop.control, [("p", good), ("2p", good)], "step", owner=None)
    staged = StepLoop(runtime, replace(mixed_run().plan, stages=(0, 1, 0, 1, 0, 1, 0)))
    with pytest.raises(ValueError, match="3 buckets, expected 6: .* 2 sizes, in 2 stages"):
        runtime.StepGraph(staged.control, [(name, good) for name in "abc"], "step", owner=None)


def test_a_signal_that_may_not_stand_in_a_body_is_refused_by_name(runtime: ModuleType) -> None:
    loop = StepLoop(runtime, plan_of(cache=tea(1.0, steps=3)))
    named = [(name, runtime.typed_graph(0, 1)) for name in "abcd"]
    with pytest.raises(runtime.NodeRefused, match=r"signal has 2 host function node\(s\)"):
        runtime.StepGraph(loop.control, named, "loop", owner=None, signal=runtime.typed_graph(3, 2))


def test_without_a_cache_every_step_computes(runtime: ModuleType) -> None:
    run, loop, buckets = emulated_run(runtime)
    loop.run_host(run.plan.steps, buckets.replay)
    assert {reason for reason, _ in loop.control.cache_records()} == {CacheReason.OFF}
    assert all(math.isnan(change) for _, change in loop.control.cache_records())
