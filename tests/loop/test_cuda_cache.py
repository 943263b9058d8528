"""Step caches in the CUDA executor, on the emulated device, against the CPU executor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from emulated_graphs import EmulatedGraphs
from models import noise, tiny_conditioning, tiny_transformer
from torch import Tensor
from wan_models import wan_conditioning, wan_transformer

import ddit_rt
from ddit_rt import (
    DDiTPolicy,
    FinePolicy,
    MagCache,
    NoCache,
    PatchPolicy,
    SeaCache,
    StaticCache,
    StaticPolicy,
    TeaCache,
)
from ddit_rt.loop import CpuExecutor, CudaExecutor, RunPlan
from ddit_rt.planning.outline import outline_run
from ddit_rt.planning.plan import plan_run
from ddit_rt.planning.request import Request
from ddit_rt.policies import StepCache
from ddit_rt.solver import probe_scheduler

SHAPES = {"flux": (2, 4, 16, 16), "wan": (1, 4, 3, 8, 16)}
FORMS = ["loop", "step", "host"]
STEPS = 12
IDENTITY = (1.0, 0.0)
TEA = TeaCache(0.15, coefficients=IDENTITY)
TEA_WAN = TeaCache(1.5, coefficients=IDENTITY)
MAG = MagCache(
    threshold=0.15,
    max_skip_steps=2,
    mag_ratios=[1.0, 0.97, 1.05, 0.99, 1.1, 0.9, 1.0, 1.02, 0.95, 1.03, 0.98, 0.9],
)
MIXED = DDiTPolicy(tau=1.0, refresh=3, fine_tail=2)


class Model:
    """A real tiny model with eager blocks, planned anew for every run."""

    def __init__(self, name: str) -> None:
        self.name = name
        transformer = tiny_transformer() if name == "flux" else wan_transformer()
        engine = ddit_rt.compile(transformer, backend="eager", progress=False)
        self._compiled = engine._compiled

    def conditioning(self, seed: int) -> dict[str, Tensor]:
        if self.name == "wan":
            return wan_conditioning(guidance_scale=4.0)
        return tiny_conditioning(self._compiled.steps.transformer, 2, seed=seed)

    def plan(
        self,
        policy: PatchPolicy,
        cache: StepCache,
        *,
        seed: int = 1,
        batched: bool = True,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> RunPlan:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(STEPS)
        outline = outline_run(
            self._compiled,
            Request(
                policy=policy,
                step_cache=cache,
                guidance_interval=interval,
                batched_guidance=batched,
            ),
            shape=SHAPES[self.name],
            timesteps=self._compiled.steps.family.linear_timesteps(scheduler),
            solver=probe_scheduler(scheduler),
            guided=self.name == "wan",
        )
        return plan_run(self._compiled, outline, self.conditioning(seed))

    def noise(self, seed: int = 0) -> Tensor:
        return noise(*SHAPES[self.name], seed=seed)


def assert_same_run(actual: tuple[Tensor, Any], expected: tuple[Tensor, Any]) -> str:
    """Equal latents to the bit, equal traces but for times and scores; `c` and `r` per step."""
    assert torch.equal(actual[0], expected[0])
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        same = {"latency_ms": 0.0, "scores": {}}
        assert replace(ours, **same) == replace(theirs, **same)
    return "".join("r" if record.reused else "c" for record in expected[1])


POLICIES = [FinePolicy(), StaticPolicy("4p:0.3,2p:0.3,p"), MIXED]
CACHES = [
    ("flux", TEA),
    ("flux", MAG),
    ("flux", replace(TEA, residual_order=1)),
    ("flux", SeaCache(0.3)),
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
    model = Model(name)
    expected = CpuExecutor().run(model.plan(policy, cache), model.noise())
    actual = CudaExecutor(graphs, form).run(model.plan(policy, cache), model.noise())
    assert "r" in assert_same_run(actual, expected)
    assert actual[1].reused == expected[1].reused


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
    finals = []
    for policy, cache, seed in runs:
        expected = CpuExecutor().run(model.plan(policy, cache, seed=seed), model.noise(seed))
        actual = executor.run(model.plan(policy, cache, seed=seed), model.noise(seed))
        assert_same_run(actual, expected)
        finals.append(actual[0])
    assert torch.equal(finals[0], finals[3])
    first = ["p", "2p", "p reused", "2p reused", "signal"]
    assert graphs.captured == [*first, "4p", "4p reused"]
    (report,) = executor.captures
    assert report.buckets == ("p", "2p", "4p", "p reused", "2p reused", "4p reused")
    assert report.nodes == dict.fromkeys([*report.buckets, "signal"], 1)


def test_runs_with_and_without_a_cache_have_graphs_of_their_own(graphs: EmulatedGraphs) -> None:
    """Without one nothing keeps residuals, and nothing measures a signal."""
    model, executor = Model("flux"), CudaExecutor(graphs, "loop")
    finals = []
    for cache in (NoCache(), TEA, MAG, NoCache(), TEA, MAG):
        expected = CpuExecutor().run(model.plan(FinePolicy(), cache), model.noise())
        actual = executor.run(model.plan(FinePolicy(), cache), model.noise())
        assert_same_run(actual, expected)
        finals.append(actual[0])
    assert graphs.captured == ["p", "p", "p reused", "signal", "p", "p reused"]
    assert all(torch.equal(a, b) for a, b in zip(finals[:3], finals[3:], strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_no_run_extrapolates_from_another(graphs: EmulatedGraphs, form: str) -> None:
    """The first ends at 2p where the second begins with it, and a NaN of one stays its own."""
    model, executor = Model("flux"), CudaExecutor(graphs, form)
    plan = ["p", "p", "2p", "2p", "2p", *["p"] * 7]
    runs: list[tuple[StepCache, list[str], float]] = [
        (StaticCache(2, first=1, last=0), ["p", "2p", *["p"] * 10], float("nan")),
        (StaticCache(2, first=1, last=0), plan, 1.0),
        (StaticCache([True, False] * 6, last=0), plan, 1.0),
        (SeaCache(1e9, max_consecutive_cached=3, power_exp=2.0), plan, 1.0),
        (SeaCache(1e9, max_consecutive_cached=3, power_exp=3.0), plan, 1.0),
    ]
    for cache, sizes, factor in runs:
        start = model.noise() * factor
        expected = CpuExecutor().run(model.plan(StaticPolicy(sizes), cache), start)
        actual = executor.run(model.plan(StaticPolicy(sizes), cache), start)
        if factor == 1.0:
            assert_same_run(actual, expected)
            assert actual[1].reused > 2
    assert len(executor.captures) == 2, "one for those with a signal"


def test_two_residuals_and_one_have_graphs_of_their_own(graphs: EmulatedGraphs) -> None:
    model, executor = Model("flux"), CudaExecutor(graphs, "loop")
    finals = []
    for order in (0, 1, 0, 1):
        cache = StaticCache(3, residual_order=order)
        expected = CpuExecutor().run(model.plan(FinePolicy(), cache), model.noise())
        actual = executor.run(model.plan(FinePolicy(), cache), model.noise())
        assert_same_run(actual, expected)
        finals.append(actual[0])
    assert torch.equal(finals[0], finals[2])
    assert torch.equal(finals[1], finals[3])
    assert not torch.equal(finals[0], finals[1])
    assert len(executor.captures) == 2


def test_two_passes_keep_a_residual_each(graphs: EmulatedGraphs) -> None:
    model = Model("wan")
    plans = [model.plan(FinePolicy(), TEA_WAN, batched=False) for _ in range(2)]
    expected = CpuExecutor().run(plans[0], model.noise())
    actual = CudaExecutor(graphs, "loop").run(plans[1], model.noise())
    assert "r" in assert_same_run(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "cache", "batched"),
    [  # all pairs
        (form, cache, (row + column) % 2 == 0)
        for row, form in enumerate(FORMS)
        for column, cache in enumerate((NoCache(), TEA_WAN, MAG, StaticCache(2, first=1)))
    ],
)
def test_steps_outside_the_guidance_interval_have_graphs_of_their_own(
    graphs: EmulatedGraphs, form: str, batched: bool, cache: StepCache
) -> None:
    """Two intervals, one after the other, on one capture."""
    model, executor = Model("wan"), CudaExecutor(graphs, form)
    for interval in ((0.0, 0.5), (0.25, 0.75)):
        plans = [
            model.plan(MIXED, cache, batched=batched, interval=interval, seed=2) for _ in range(2)
        ]
        expected = CpuExecutor().run(plans[0], model.noise())
        actual = executor.run(plans[1], model.noise())
        assert ("r" in assert_same_run(actual, expected)) is (cache != NoCache())
    (report,) = executor.captures
    assert {"p", "p unguided"} <= set(report.buckets)


@pytest.mark.parametrize("form", FORMS)
def test_one_launch_and_nothing_that_waits(graphs: EmulatedGraphs, form: str) -> None:
    model, executor = Model("flux"), CudaExecutor(graphs, form)
    executor.run(model.plan(MIXED, TEA), model.noise())
    graphs.runtime.clear_calls()
    executor.run(model.plan(MIXED, TEA), model.noise())
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
    expected = CpuExecutor().run(model.plan(policy, cache), start)
    _, trace = CudaExecutor(graphs, form).run(model.plan(policy, cache), start)
    assert [r.cache_reason for r in trace] == [r.cache_reason for r in expected[1]]
    assert trace[1].cache_reason == "computed: signal not finite"
    assert trace.nonfinite
