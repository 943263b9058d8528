"""What a caller does to a run of the CUDA executor: progress, stopping."""

from __future__ import annotations

import pytest
import torch
from emulated_graphs import EmulatedGraphs
from models import noise
from scripted_runs import (
    FORMS,
    MIXED,
    SHAPE,
    assert_same_run,
    euler,
    first_bucket,
    scripted_plan,
)
from torch import Tensor

from ddit_rt.loop import CpuExecutor, CudaExecutor
from ddit_rt.policies import StaticPolicy


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
    bucket = first_bucket(plan)
    bucket.before = lambda step: loop.control.cancel() if step == 2 else None
    _, trace = executor.run(plan, noise(*SHAPE))
    assert len(trace) == 3
    assert trace.cancelled
    bucket.before = None
    _, trace = executor.run(plan, noise(*SHAPE))
    assert len(trace) == 6
    assert not trace.cancelled


@pytest.mark.parametrize("form", FORMS)
def test_an_error_in_the_progress_leaves_the_executor_usable(
    graphs: EmulatedGraphs, form: str
) -> None:
    def fail(step: int) -> None:
        raise KeyError("mine")

    executor = CudaExecutor(graphs, form)
    plan = scripted_plan(StaticPolicy("p"), euler(5))
    with pytest.raises(KeyError, match="mine"):
        executor.run(plan, noise(*SHAPE), on_progress=fail)
    assert_same_run(executor.run(plan, noise(*SHAPE)), CpuExecutor().run(plan, noise(*SHAPE)))


@pytest.mark.parametrize("form", ["auto", *FORMS])
def test_a_watched_run_shows_every_step_as_on_the_cpu(graphs: EmulatedGraphs, form: str) -> None:
    plan = scripted_plan(MIXED, euler(7))
    seen: dict[str, list[tuple[int, int, Tensor]]] = {"cpu": [], "cuda": []}
    expected = CpuExecutor().run(
        plan, noise(*SHAPE), on_step=lambda *step: seen["cpu"].append(step)
    )
    executor = CudaExecutor(graphs, form)
    actual = executor.run(plan, noise(*SHAPE), on_step=lambda *step: seen["cuda"].append(step))
    assert_same_run(actual, expected)
    assert len({branch for _, branch, _ in seen["cpu"]}) > 1
    for ours, theirs in zip(seen["cuda"], seen["cpu"], strict=True):
        assert ours[:2] == theirs[:2]
        assert torch.equal(ours[2], theirs[2])
    watched = "executor: step instead of loop, because the latents of steps are watched"
    assert (watched in actual[1].notes) == (form in ("auto", "loop"))
    assert actual[1].executor == ("cuda-host" if form == "host" else "cuda-step")
    again = executor.run(plan, noise(*SHAPE))
    assert again[1].executor == ("cuda-loop" if form in ("auto", "loop") else f"cuda-{form}")
