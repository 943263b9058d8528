"""The CUDA executor on the emulated device, against the CPU executor."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from emulated_graphs import EmulatedGraphs
from models import noise, tiny_conditioning, tiny_transformer
from torch import Tensor

import ddit_rt
from ddit_rt.buckets import RunContext, at_step
from ddit_rt.errors import CaptureError
from ddit_rt.executor import CpuExecutor, CudaExecutor, RunPlan
from ddit_rt.families.flux import FluxFamily
from ddit_rt.patch_scheduler import DDiTPolicy, FinePolicy, PatchPolicy, Schedule, StaticPolicy
from ddit_rt.pipeline.callbacks import follow_replaced
from ddit_rt.pipeline.planning import CompiledModel, plan_run
from ddit_rt.solver import SolverTable, probe_scheduler

SHAPE = (1, 4, 16, 16)
FORMS = ["loop", "step", "host"]
HOST_NODE = 3  # cudaGraphNodeTypeHost


class ScriptedBucket:
    """Velocities fixed beforehand."""

    def __init__(self, multiple: int, velocities: Tensor) -> None:
        self.multiple = multiple
        self.tokens = 64 // multiple**2
        self._velocities = velocities

    def velocity(self, latents: Tensor, step: Tensor, *, reuse: bool = False) -> Tensor:
        return at_step(self._velocities, step) / (self.multiple + 0.5 * reuse)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self._velocities,)


def euler(steps: int) -> SolverTable:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return probe_scheduler(scheduler)


def unipc(steps: int) -> SolverTable:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    return probe_scheduler(scheduler)


def scripted_plan(
    policy: PatchPolicy,
    solver: SolverTable,
    *,
    seed: int = 0,
    shape: tuple[int, ...] = SHAPE,
    offered: tuple[int, ...] = (1, 2, 4),
    capacity: int = 16,
) -> RunPlan:
    """Buckets that decay, so that scores cross thresholds."""
    decay = torch.tensor([0.5**step for step in range(capacity)])
    velocities = noise(capacity, *shape, seed=seed) * decay.reshape(-1, *[1] * len(shape))
    return RunPlan(
        buckets=[ScriptedBucket(multiple, velocities.clone()) for multiple in offered],
        offered=offered,
        policy=policy.resolve(Schedule(sigmas=solver.sigmas, offered=offered)),
        solver=solver,
        patch_size=2,
        capacity=capacity,
    )


@pytest.fixture
def graphs(emulated_runtime: Any) -> Any:
    emulated_runtime.reset()
    yield EmulatedGraphs(emulated_runtime)
    assert emulated_runtime.violation() == ""


def assert_same_run(
    actual: tuple[Tensor, Any], expected: tuple[Tensor, Any], *, scores: bool = True
) -> None:
    """Equal latents to the bit; equal traces but for times and names."""
    assert torch.equal(actual[0], expected[0])
    assert len(actual[1]) == len(expected[1])
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        assert replace(ours, latency_ms=0.0, scores={}) == replace(
            theirs, latency_ms=0.0, scores={}
        )
        if scores:
            # The two merge moments in another order: a few units in the last place.
            assert ours.scores == pytest.approx(theirs.scores, rel=5e-6, nan_ok=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", [euler(12), unipc(12)], ids=["euler", "unipc"])
@pytest.mark.parametrize(
    "policy",
    [
        DDiTPolicy(tau=0.05, refresh=None, fine_tail=1),
        DDiTPolicy(
            tau=0.02, order=2, rho=1.0, dwell=2, monotone=True, warmup="coarse", refresh=None
        ),
        StaticPolicy("4p:0.3,2p:0.3,p"),
    ],
    ids=["ddit", "dwell", "static"],
)
def test_equals_the_cpu_executor(
    graphs: EmulatedGraphs, form: str, solver: SolverTable, policy: PatchPolicy
) -> None:
    expected = CpuExecutor().run(scripted_plan(policy, solver), noise(*SHAPE))
    actual = CudaExecutor(graphs, form).run(scripted_plan(policy, solver), noise(*SHAPE))
    assert_same_run(actual, expected)
    assert actual[1].executor == f"cuda-{form}"
    assert len(set(actual[1].patch_sizes())) > 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "offered"), [((3, 4, 24, 40), (1, 2)), ((2, 5, 10, 14), (1,)), ((1, 3, 8, 8), (1, 4))]
)
def test_equals_the_cpu_executor_at_other_shapes(
    graphs: EmulatedGraphs, form: str, shape: tuple[int, ...], offered: tuple[int, ...]
) -> None:
    policy, solver = DDiTPolicy(tau=0.02, refresh=3), euler(9)
    arguments = {"shape": shape, "offered": offered}
    expected = CpuExecutor().run(scripted_plan(policy, solver, **arguments), noise(*shape))
    actual = CudaExecutor(graphs, form).run(
        scripted_plan(policy, solver, **arguments), noise(*shape)
    )
    assert_same_run(actual, expected)


@pytest.mark.parametrize("form", FORMS)
def test_nan_falls_back_to_the_base_patch_and_is_reported(
    graphs: EmulatedGraphs, form: str
) -> None:
    plan = scripted_plan(DDiTPolicy(tau=1e9, warmup="coarse", refresh=None, fine_tail=0), euler(8))
    for bucket in plan.buckets:
        assert isinstance(bucket, ScriptedBucket)
        bucket.tensors()[0][4] = math.nan
    _, trace = CudaExecutor(graphs, form).run(plan, noise(*SHAPE))
    assert trace.patch_sizes() == ["4p"] * 5 + ["p"] * 3
    assert trace[5].reason == "score not finite: base patch"
    assert trace.nonfinite


class TinyModel:
    """A real model with eager blocks, planned anew for every run."""

    def __init__(self) -> None:
        self.transformer = tiny_transformer()
        engine = ddit_rt.compile(self.transformer, backend="eager", progress=False)
        self.compiled: CompiledModel = engine._compiled

    def plan(
        self, policy: PatchPolicy, *, seed: int = 1, steps: int = 10
    ) -> tuple[RunPlan, RunContext]:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(steps)
        return plan_run(
            self.compiled,
            shape=SHAPE,
            conditioning=tiny_conditioning(self.transformer, seed=seed),
            timesteps=FluxFamily().linear_timesteps(scheduler),
            solver=probe_scheduler(scheduler),
            policy=policy,
        )


MIXED = DDiTPolicy(tau=1.0, refresh=2, fine_tail=1)


@pytest.mark.parametrize("form", FORMS)
def test_a_captured_model_serves_other_runs_of_its_shape(graphs: EmulatedGraphs, form: str) -> None:
    """Prompt, policy and noise change, and no run knows of another."""
    model, executor = TinyModel(), CudaExecutor(graphs, form)
    runs = [(StaticPolicy(["p", "2p"] * 5), 1), (MIXED, 2), (StaticPolicy(["p", "2p"] * 5), 1)]
    finals = []
    for policy, seed in runs:
        expected = CpuExecutor().run(model.plan(policy, seed=seed)[0], noise(*SHAPE, seed=seed))
        actual = executor.run(model.plan(policy, seed=seed)[0], noise(*SHAPE, seed=seed))
        assert_same_run(actual, expected)
        finals.append(actual[0])
    assert torch.equal(finals[0], finals[2])
    assert graphs.captured == ["p", "2p", "4p"]  # each once, when a policy first reaches it
    (report,) = executor.captures
    assert report.buckets == ("p", "2p", "4p")
    assert report.latents == SHAPE
    assert report.text_tokens == 7
    assert report.nodes == {"p": 1, "2p": 1, "4p": 1}


def test_moved_weights_are_captured_again(graphs: EmulatedGraphs) -> None:
    executor = CudaExecutor(graphs, "loop")
    plan = scripted_plan(FinePolicy(), euler(4))
    executor.run(plan, noise(*SHAPE))
    executor.run(replace(plan, weights=(1, 2)), noise(*SHAPE))
    assert graphs.captured == ["p", "p"]
    executor.forget()
    executor.run(plan, noise(*SHAPE))
    assert graphs.captured == ["p", "p", "p"]
    assert len(executor.captures) == 1


def test_the_shape_that_was_not_used_for_longest_makes_room(graphs: EmulatedGraphs) -> None:
    executor = CudaExecutor(graphs, "loop")

    def run(width: int) -> None:
        shape = (1, 2, 8, 8 * width)
        plan = scripted_plan(FinePolicy(), euler(2), shape=shape, offered=(1,))
        executor.run(plan, noise(*shape))

    for width in range(1, 9):
        run(width)
    run(1)
    run(9)  # takes the place of width 2
    assert len(executor.captures) == 8
    before = len(graphs.captured)
    run(1)
    assert len(graphs.captured) == before
    run(2)
    assert len(graphs.captured) == before + 1


def test_one_launch_and_no_synchronisation_per_image_in_loop_form(graphs: EmulatedGraphs) -> None:
    executor = CudaExecutor(graphs, "loop")
    executor.run(scripted_plan(MIXED, euler(10)), noise(*SHAPE))
    graphs.runtime.clear_calls()
    executor.run(scripted_plan(MIXED, euler(10), seed=3), noise(*SHAPE))
    calls = graphs.runtime.calls()
    assert calls.pop("cudaGraphLaunch") == 1
    assert set(calls) <= {"cudaEventRecord", "cudaEventQuery"}, "nothing that waits"


@pytest.mark.parametrize("form", ["auto", "loop", "step", "host"])
def test_callback_gets_the_latents_of_every_step_and_may_replace_them(
    graphs: EmulatedGraphs, form: str
) -> None:
    seen: dict[str, list[Tensor]] = {"cpu": [], "cuda": []}

    def callback(name: str) -> Any:
        def record(step: int, latents: Tensor) -> Tensor | None:
            seen[name].append(latents.clone())
            return latents * 0.5 if step == 2 else None

        return record

    plan = scripted_plan(StaticPolicy("2p:0.5,p"), euler(6))
    expected = CpuExecutor().run(plan, noise(*SHAPE), on_step_end=callback("cpu"))
    actual = CudaExecutor(graphs, form).run(plan, noise(*SHAPE), on_step_end=callback("cuda"))
    assert_same_run(actual, expected)
    assert all(torch.equal(a, b) for a, b in zip(seen["cuda"], seen["cpu"], strict=True))
    if form in ("auto", "loop"):
        assert actual[1].executor == "cuda-step"
        assert "callback" in actual[1].notes[0]


@pytest.mark.parametrize("form", ["auto", "host"])
def test_latents_that_a_corrector_does_not_go_on_from_reach_the_captured_graphs(
    graphs: EmulatedGraphs, form: str
) -> None:
    """Twice on one captured loop: the second run must not see the first one's change."""

    def callback(step: int, latents: Tensor) -> Tensor | None:
        return latents * 0.5 if step in (1, 2, 5) else None

    model, executor = TinyModel(), CudaExecutor(graphs, form)

    def run(runner: CpuExecutor | CudaExecutor, seed: int) -> tuple[Tensor, Any]:
        latents = noise(*SHAPE, seed=seed)
        plan, _ = model.plan(StaticPolicy("2p:0.5,p"), seed=seed)
        plan = replace(plan, solver=unipc(plan.policy.steps))
        plan, record, change = follow_replaced(plan, latents, callback)
        final, trace = runner.run(plan, latents, on_step_end=record)
        assert change is not None
        return final + change, trace

    for seed in (0, 1):
        assert_same_run(run(executor, seed), run(CpuExecutor(), seed))


def test_callback_that_changes_the_prompt_reaches_the_captured_graphs(
    graphs: EmulatedGraphs,
) -> None:
    """Also on a loop that was captured for another run's prompt."""
    model, executor = TinyModel(), CudaExecutor(graphs, "step")
    executor.run(model.plan(FinePolicy(), seed=9)[0], noise(*SHAPE))

    def run(runner: CpuExecutor | CudaExecutor) -> tuple[Tensor, Any]:
        plan, prompt = model.plan(FinePolicy(), seed=1)
        other = tiny_conditioning(model.transformer, seed=2)["encoder_hidden_states"]

        def callback(step: int, latents: Tensor) -> None:
            if step == 4:
                prompt.rewrite({"encoder_hidden_states": other})

        return runner.run(plan, noise(*SHAPE), on_step_end=callback)

    assert_same_run(run(executor), run(CpuExecutor()))


@pytest.mark.parametrize("form", FORMS)
def test_progress_reports_every_step_once(graphs: EmulatedGraphs, form: str) -> None:
    done: list[int] = []
    plan = scripted_plan(StaticPolicy("p"), euler(7))
    CudaExecutor(graphs, form).run(plan, noise(*SHAPE), on_progress=done.append)
    assert done == list(range(7))


@pytest.mark.parametrize("form", ["step", "host"])
def test_stop_ends_between_two_steps(graphs: EmulatedGraphs, form: str) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 3

    executor = CudaExecutor(graphs, form)
    plan = scripted_plan(StaticPolicy("p"), euler(6))
    final, trace = executor.run(plan, noise(*SHAPE), should_stop=stop)
    assert len(trace) == 3
    assert trace.cancelled
    whole, trace = executor.run(plan, noise(*SHAPE))
    assert not trace.cancelled
    assert not torch.equal(final, whole)


def test_stop_inside_the_loop_form_ends_it_on_the_device(graphs: EmulatedGraphs) -> None:
    """The emulated launch returns when the loop is over, so the wish comes from within a step."""
    executor = CudaExecutor(graphs, "loop")
    plan = scripted_plan(StaticPolicy("p"), euler(6))
    executor.run(plan, noise(*SHAPE))
    (loop,) = executor._loops.values()
    bucket = plan.buckets[0]
    assert isinstance(bucket, ScriptedBucket)
    velocity = bucket.velocity

    def cancelling(latents: Tensor, step: Tensor, *, reuse: bool = False) -> Tensor:
        if int(step) == 2:
            loop.control.cancel()
        return velocity(latents, step)

    bucket.velocity = cancelling  # type: ignore[method-assign]
    _, trace = executor.run(plan, noise(*SHAPE))
    assert len(trace) == 3
    assert trace.cancelled
    bucket.velocity = velocity  # type: ignore[method-assign]
    _, trace = executor.run(plan, noise(*SHAPE))
    assert len(trace) == 6
    assert not trace.cancelled


@pytest.mark.parametrize("form", ["step", "host"])
def test_an_error_in_a_callback_leaves_the_executor_usable(
    graphs: EmulatedGraphs, form: str
) -> None:
    def fail(step: int, latents: Tensor) -> None:
        raise KeyError("mine")

    executor = CudaExecutor(graphs, form)
    plan = scripted_plan(StaticPolicy("p"), euler(5))
    with pytest.raises(KeyError, match="mine"):
        executor.run(plan, noise(*SHAPE), on_step_end=fail)
    assert_same_run(executor.run(plan, noise(*SHAPE)), CpuExecutor().run(plan, noise(*SHAPE)))


def test_too_old_a_driver_falls_back_to_the_host_with_one_warning(graphs: EmulatedGraphs) -> None:
    graphs.runtime.set_driver(12040)
    executor = CudaExecutor(graphs)
    plan = scripted_plan(MIXED, euler(8))
    with pytest.warns(UserWarning, match=r"12\.4.*12\.8"):
        _, trace = executor.run(plan, noise(*SHAPE))
    assert trace.executor == "cuda-host"
    assert any("12.8" in note for note in trace.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, trace = executor.run(plan, noise(*SHAPE))
    assert any("12.8" in note for note in trace.notes)


@pytest.mark.parametrize("form", ["loop", "step"])
def test_a_form_that_was_asked_for_is_never_replaced(graphs: EmulatedGraphs, form: str) -> None:
    graphs.runtime.set_driver(12040)
    with pytest.raises(CaptureError, match=rf'executor="{form}".*12\.8'):
        CudaExecutor(graphs, form).run(scripted_plan(MIXED, euler(8)), noise(*SHAPE))


def test_a_bucket_that_cannot_be_switched_to_is_named(graphs: EmulatedGraphs) -> None:
    graphs.node_type = HOST_NODE
    with pytest.raises(CaptureError, match=r"bucket p has 1 host function node.*Likely cause"):
        CudaExecutor(graphs, "loop").run(scripted_plan(FinePolicy(), euler(4)), noise(*SHAPE))
    with pytest.warns(UserWarning, match="host function"):
        _, trace = CudaExecutor(graphs).run(scripted_plan(FinePolicy(), euler(4)), noise(*SHAPE))
    assert trace.executor == "cuda-host"


def test_input_latents_are_not_written_to(graphs: EmulatedGraphs) -> None:
    start = noise(*SHAPE)
    final, _ = CudaExecutor(graphs).run(scripted_plan(FinePolicy(), euler(4)), start)
    assert torch.equal(start, noise(*SHAPE))
    again, _ = CudaExecutor(graphs).run(scripted_plan(FinePolicy(), euler(4)), start * 2)
    assert not torch.equal(final, again)


def test_two_executors_interleave(graphs: EmulatedGraphs) -> None:
    """Two engines of one process share the device and nothing else."""
    executors = [CudaExecutor(graphs, "loop"), CudaExecutor(graphs, "step")]
    plans = [scripted_plan(MIXED, euler(8), seed=seed) for seed in (1, 2)]
    expected = [CpuExecutor().run(plan, noise(*SHAPE)) for plan in plans]
    for _ in range(2):
        for executor, plan, reference in zip(executors, plans, expected, strict=True):
            assert_same_run(executor.run(plan, noise(*SHAPE)), reference)
