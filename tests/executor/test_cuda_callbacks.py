"""What a caller does to a run of the CUDA executor: callbacks, progress, stopping."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated_graphs import EmulatedGraphs
from models import noise, tiny_conditioning
from scripted_runs import (
    FORMS,
    SHAPE,
    ScriptedBucket,
    TinyModel,
    assert_same_run,
    euler,
    scripted_plan,
    unipc,
)
from torch import Tensor

from ddit_rt.executor import CpuExecutor, CudaExecutor, RunPlan
from ddit_rt.patch_scheduler import DDiTPolicy, FinePolicy, StaticPolicy
from ddit_rt.pipeline.callbacks import follow_replaced


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


@pytest.mark.parametrize("form", ["step", "host"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "offered"),
    [
        ((2, 4, 16, 24), (1, 2, 4)),
        ((1, 3, 3, 8, 16), (1, 4)),  # frames
        ((1, 2, 96, 144), (1, 24)),  # base patches of 24, the widest divisor of 48 up to 32
        (SHAPE, (1,)),
    ],
)
def test_latents_that_a_callback_replaced_decide_the_next_step(
    graphs: EmulatedGraphs, form: str, order: int, shape: tuple[int, ...], offered: tuple[int, ...]
) -> None:
    """And the steps after it, as long as they are among those that the difference is of."""

    def callback(step: int, latents: Tensor) -> Tensor | None:
        return latents.roll(1, -1) * 0.5 if step in (0, 4, 7) else None

    def plan() -> RunPlan:
        policy = DDiTPolicy(tau=0.05, order=order, refresh=None, fine_tail=0)
        return scripted_plan(policy, euler(8), shape=shape, offered=offered)

    expected = CpuExecutor().run(plan(), noise(*shape), on_step_end=callback)
    actual = CudaExecutor(graphs, form).run(plan(), noise(*shape), on_step_end=callback)
    assert_same_run(actual, expected)


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
    bucket = plan.buckets[0][0]
    assert isinstance(bucket, ScriptedBucket)
    velocity = bucket.velocity

    def cancelling(
        latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = True
    ) -> Tensor:
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
