"""Step caches in the CUDA executor, on the emulated device, against the CPU executor."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated_graphs import EmulatedGraphs
from models import noise
from scripted_runs import FORMS, TinyModel, assert_same_run
from torch import Tensor

from ddit_rt import (
    DDiTPolicy,
    FinePolicy,
    FirstBlockCache,
    MagCache,
    NoCache,
    PatchPolicy,
    SeaCache,
    StaticCache,
    StaticPolicy,
    TeaCache,
)
from ddit_rt.loop import CpuExecutor, CudaExecutor, RunTrace
from ddit_rt.policies import StepCache

STEPS = 12
IDENTITY = (1.0, 0.0)
TEA = TeaCache(0.15, coefficients=IDENTITY)
TEA_WAN = TeaCache(1.5, coefficients=IDENTITY)
MAG = MagCache(
    threshold=0.15,
    max_skip_steps=2,
    mag_ratios=[1.0, 0.97, 1.05, 0.99, 1.1, 0.9, 1.0, 1.02, 0.95, 1.03, 0.98, 0.9],
)
FIRST = FirstBlockCache(0.15)
MIXED = DDiTPolicy(tau=1.0, refresh=3, fine_tail=2)
SHAPES = {"flux": (2, 4, 16, 16), "wan": (1, 4, 3, 8, 16)}


class Model(TinyModel):
    """Runs of it under a step cache."""

    def __init__(self, name: str) -> None:
        super().__init__(name, SHAPES[name])

    def noise(self, seed: int = 0) -> Tensor:
        return noise(*self.shape, seed=seed)

    def same(
        self,
        executor: CudaExecutor,
        policy: PatchPolicy,
        cache: StepCache,
        *,
        start: Tensor | None = None,
        **planned: Any,
    ) -> tuple[Tensor, RunTrace]:
        """A run that has the CPU's bits, and its trace."""
        start = self.noise() if start is None else start
        plans = [self.plan(policy, cache, steps=STEPS, **planned) for _ in range(2)]
        expected = CpuExecutor().run(plans[0], start)
        actual = executor.run(plans[1], start)
        assert_same_run(actual, expected)
        return actual


POLICIES = [FinePolicy(), StaticPolicy("4p:0.3,2p:0.3,p"), MIXED]
CACHES = [
    ("flux", TEA),
    ("flux", MAG),
    ("flux", replace(TEA, residual_order=1)),
    ("flux", SeaCache(0.3)),
    ("flux", FirstBlockCache(0.5)),
    ("wan", FirstBlockCache(0.15, residual_order=1)),
    ("wan", TEA_WAN),
    ("wan", MAG),
    ("wan", SeaCache(0.3, residual_order=0)),
    ("wan", StaticCache(2)),
]


@pytest.mark.parametrize(
    ("form", "policy", "name", "cache"),
    [  # all pairs
        (form, POLICIES[(row + column) % 3], *CACHES[row])
        for row in range(len(CACHES))
        for column, form in enumerate(FORMS)
    ],
)
def test_equals_the_cpu_executor(
    graphs: EmulatedGraphs, form: str, policy: PatchPolicy, name: str, cache: StepCache
) -> None:
    _, trace = Model(name).same(CudaExecutor(graphs, form), policy, cache)
    assert trace.reused > 0


@pytest.mark.parametrize("form", FORMS)
def test_a_captured_model_serves_other_runs_of_its_shape(graphs: EmulatedGraphs, form: str) -> None:
    """Prompt, noise, policy and cache change, and no run knows of another."""
    model, executor = Model("flux"), CudaExecutor(graphs, form)
    runs: list[tuple[PatchPolicy, StepCache, int]] = [
        (StaticPolicy(["p", "p", "p", "2p"] * 3), TEA, 1),
        (MIXED, TeaCache(0.5, coefficients=(0.5, 0.01)), 2),
        (
            StaticPolicy(["p", *["2p"] * 8, *["p"] * 3]),
            TeaCache(1e9, coefficients=IDENTITY, first=3),
            3,
        ),
        (StaticPolicy(["p", "p", "p", "2p"] * 3), TEA, 1),
    ]
    finals = [
        model.same(executor, policy, cache, seed=seed, start=model.noise(seed))[0]
        for policy, cache, seed in runs
    ]
    assert torch.equal(finals[0], finals[3])
    first = ["p", "2p", "p reused", "2p reused", "signal"]
    assert graphs.captured == [*first, "4p", "4p reused"]
    (report,) = executor.captures
    assert report.buckets == ("p", "2p", "4p", "p reused", "2p reused", "4p reused")
    assert report.nodes == dict.fromkeys([*report.buckets, "signal"], 1)


def test_runs_with_and_without_a_cache_have_graphs_of_their_own(graphs: EmulatedGraphs) -> None:
    """Without one nothing keeps residuals, nor measures a signal; some keep two residuals."""
    model, executor = Model("flux"), CudaExecutor(graphs, "loop")
    caches = [NoCache(), TEA, MAG, StaticCache(3)]
    finals = [model.same(executor, FinePolicy(), cache)[0] for cache in (*caches, *caches)]
    kept = ["p", "p reused"]
    assert graphs.captured == ["p", *kept, "signal", *kept, *kept]
    assert all(torch.equal(a, b) for a, b in zip(finals[:4], finals[4:], strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_no_run_extrapolates_from_another(graphs: EmulatedGraphs, form: str) -> None:
    """The first ends at 2p where the second begins with it, and a NaN of one stays its own."""
    model, executor = Model("flux"), CudaExecutor(graphs, form)
    static = StaticCache(2, first=1, last=0)
    before = model.plan(StaticPolicy(["p", "2p", *["p"] * 10]), static, steps=STEPS)
    executor.run(before, model.noise() * math.nan)
    for cache in (
        static,
        StaticCache([True, False] * 6, last=0),
        SeaCache(1e9, max_consecutive_cached=3, power_exp=2.0),
        SeaCache(1e9, max_consecutive_cached=3, power_exp=3.0),
    ):
        policy = StaticPolicy(["p", "p", "2p", "2p", "2p", *["p"] * 7])
        assert model.same(executor, policy, cache)[1].reused > 2
    assert len(executor.captures) == 2, "one for those with a signal"


@pytest.mark.parametrize("cache", [TEA_WAN, FIRST])
def test_two_passes_keep_a_residual_each(graphs: EmulatedGraphs, cache: StepCache) -> None:
    executor = CudaExecutor(graphs, "loop")
    _, trace = Model("wan").same(executor, FinePolicy(), cache, batched_guidance=False)
    assert trace.reused > 0


@pytest.mark.parametrize("form", FORMS)
def test_a_first_block_is_one_for_graphs_of_several_runs(graphs: EmulatedGraphs, form: str) -> None:
    """The signal is captured with a run that takes no step at p."""
    model, executor = Model("flux"), CudaExecutor(graphs, form)
    cache = FirstBlockCache(0.6)
    for seed, policy in enumerate([StaticPolicy("2p"), FinePolicy(), StaticPolicy("2p:0.5,p")]):
        start = model.noise(seed)
        _, trace = model.same(executor, policy, cache, seed=seed, start=start)
        assert 0 < trace.reused < STEPS - 1
    assert graphs.captured == ["2p", "2p reused", "signal", "p", "p reused"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "cache", "batched"),
    [  # all pairs
        (form, cache, (row + column) % 2 == 0)
        for row, form in enumerate(FORMS)
        for column, cache in enumerate((NoCache(), FIRST, MAG, StaticCache(2, first=1)))
    ],
)
def test_steps_outside_the_guidance_interval_have_graphs_of_their_own(
    graphs: EmulatedGraphs, form: str, batched: bool, cache: StepCache
) -> None:
    """Two intervals, one after the other, on one capture."""
    model, executor = Model("wan"), CudaExecutor(graphs, form)
    for interval in ((0.0, 0.5), (0.25, 0.75)):
        guidance = {"guidance_interval": interval, "batched_guidance": batched}
        _, trace = model.same(executor, MIXED, cache, **guidance)
        assert (trace.reused > 0) is (cache != NoCache())
    (report,) = executor.captures
    assert {"p", "p unguided"} <= set(report.buckets)


@pytest.mark.parametrize("form", FORMS)
def test_one_launch_and_nothing_that_waits(graphs: EmulatedGraphs, form: str) -> None:
    model, executor = Model("flux"), CudaExecutor(graphs, form)
    executor.run(model.plan(MIXED, TEA, steps=STEPS), model.noise())
    graphs.runtime.clear_calls()
    executor.run(model.plan(MIXED, TEA, steps=STEPS), model.noise())
    calls = graphs.runtime.calls()
    assert calls.get("cudaGraphLaunch", 0) == {"loop": 1, "step": STEPS, "host": 0}[form]
    assert set(calls) <= {
        *("cudaGraphLaunch", "cudaLaunchKernel", "cudaEventRecord", "cudaEventQuery")
    }


@pytest.mark.parametrize("form", FORMS)
def test_nan_computes_and_is_reported(graphs: EmulatedGraphs, form: str) -> None:
    model = Model("flux")
    start = model.noise()
    start[1, 0, 0, 0] = float("nan")
    policy, cache = FinePolicy(), TeaCache(1e9, coefficients=IDENTITY)
    expected = CpuExecutor().run(model.plan(policy, cache, steps=STEPS), start)
    _, trace = CudaExecutor(graphs, form).run(model.plan(policy, cache, steps=STEPS), start)
    assert [r.cache_reason for r in trace] == [r.cache_reason for r in expected[1]]
    assert trace[1].cache_reason == "computed: signal not finite"
    assert trace.nonfinite
