"""Runs of the step loop: its forms agree, stop when told to, and tell how far they are."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
from step_loop import (
    EmulatedBuckets,
    MixedRun,
    StepLoop,
    emulated_run,
    launch,
    mixed_run,
    run_form,
)

FORMS = ["loop", "step", "host"]
GRAPH_FORMS = ["loop", "step"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"forced": [0, 2, 1, 0, 1, 1, 2]},
        {"dwell": 2, "order": 2, "dtype": torch.bfloat16},
        {"forced": [2, 2, 2, -1, -1, -1, -1], "monotone": True, "quantile": 1.0},
    ],
    ids=["dynamic", "static", "dwell", "monotone"],
)
def test_all_forms_have_the_same_bits(runtime: ModuleType, changes: dict[str, Any]) -> None:
    run = mixed_run(**changes)
    results = []
    for form in FORMS:
        _, loop, buckets = emulated_run(runtime, run)
        run_form(loop, form, buckets, run.plan.steps)
        results.append(loop.bits())
        assert buckets.log == list(enumerate(run.cpu.buckets))
        assert loop.control.progress().finished
    assert torch.equal(results[0]["latents"], run.cpu.latents[-1].view(torch.int32))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])


def test_the_loop_form_is_one_launch_and_waits_for_nothing(runtime: ModuleType) -> None:
    run, loop, buckets = emulated_run(runtime)
    graph = runtime.StepGraph(loop.control, buckets.graphs, "loop", owner=None)
    graph.upload(0)
    runtime.clear_calls()
    graph.launch(0)
    assert runtime.calls() == {"cudaGraphLaunch": 1, "cudaEventRecord": 1}
    assert loop.control.progress().decided == run.plan.steps
    loop.control.records()
    assert runtime.calls() == {"cudaGraphLaunch": 1, "cudaEventRecord": 1}  # mapped memory only
    assert runtime.kernel_runs() == {
        "begin": 1,
        "decide": run.plan.steps,
        "update<float32, 4>": run.plan.steps,
        "finish": 1,
    }


def test_the_step_form_is_one_launch_a_step_and_waits_for_nothing(runtime: ModuleType) -> None:
    run, loop, buckets = emulated_run(runtime)
    graph = runtime.StepGraph(loop.control, buckets.graphs, "step", owner=None)
    runtime.clear_calls()
    launch(graph, loop.control, "step", run.plan.steps)
    assert runtime.calls() == {
        "cudaGraphLaunch": run.plan.steps,
        "cudaLaunchKernel": 2,
        "cudaEventRecord": run.plan.steps + 2,
    }


@pytest.mark.parametrize("form", GRAPH_FORMS)
def test_one_graph_serves_runs_with_other_tables(runtime: ModuleType, form: str) -> None:
    """Steps, order, quantile, solver and thresholds are data."""
    long = mixed_run(steps=9)
    loop = StepLoop(runtime, long.plan)
    current = [long]

    def model(k: int, bucket: int, latents: torch.Tensor) -> torch.Tensor:
        return current[0].model(k, bucket, latents)

    buckets = EmulatedBuckets(loop, model, 3)
    graph = runtime.StepGraph(loop.control, buckets.graphs, form, owner=buckets)
    for run in (long, mixed_run(steps=5, order=1, quantile=0.9, dwell=2), long):
        current[0] = run
        loop.load(run.plan, run.cpu.latents[0])
        launch(graph, loop.control, form, run.plan.steps)
        assert torch.equal(loop["latents"], run.cpu.latents[-1])
        assert loop.record()[:, 0].tolist() == run.cpu.buckets


def cancel_in_step(loop: StepLoop, run: MixedRun, step: int) -> EmulatedBuckets:
    """Buckets of which the one that runs in this step cancels the run, once."""
    armed = [True]

    def model(k: int, bucket: int, latents: torch.Tensor) -> torch.Tensor:
        if k == step and armed[0]:
            armed[0] = False
            loop.control.cancel()
        return run.model(k, bucket, latents)

    return EmulatedBuckets(loop, model, 3)


@pytest.mark.parametrize(
    ("form", "step"), [("loop", 0), ("loop", 5), ("step", 0), ("step", 3), ("host", 3)]
)
def test_cancel_stops_before_the_next_step_and_not_the_next_run(
    runtime: ModuleType, form: str, step: int
) -> None:
    run, loop, _ = emulated_run(runtime)
    buckets = cancel_in_step(loop, run, step)
    run_form(loop, form, buckets, run.plan.steps)
    progress = loop.control.progress()
    assert (progress.decided, progress.finished, progress.cancelled) == (step + 1, True, True)
    assert buckets.log == list(enumerate(run.cpu.buckets[: step + 1]))
    assert len(loop.control.records()) == step + 1
    assert torch.equal(loop["latents"], run.cpu.latents[step + 1])

    loop.load(run.plan, run.cpu.latents[0])
    run_form(loop, form, buckets, run.plan.steps)
    progress = loop.control.progress()
    assert (progress.decided, progress.cancelled) == (run.plan.steps, False)
    assert torch.equal(loop["latents"], run.cpu.latents[-1])


@pytest.mark.parametrize("form", FORMS)
def test_cancel_during_the_last_step_changes_nothing(runtime: ModuleType, form: str) -> None:
    run, loop, _ = emulated_run(runtime)
    run_form(loop, form, cancel_in_step(loop, run, run.plan.steps - 1), run.plan.steps)
    assert not loop.control.progress().cancelled
    assert torch.equal(loop["latents"], run.cpu.latents[-1])


def test_later_launches_of_a_stopped_run_compute_nothing(runtime: ModuleType) -> None:
    _, loop, buckets = emulated_run(runtime)
    graph = runtime.StepGraph(loop.control, buckets.graphs, "step", owner=buckets)
    loop.control.begin(0)
    for _ in range(4):
        graph.launch(0)
    loop.control.cancel()
    before, log = loop.bits(), list(buckets.log)
    for _ in range(3):
        graph.launch(0)
    loop.control.finish(0)
    assert buckets.log == log
    after = loop.bits()
    del before["scores"]  # the first decision scores the step before it learns of the cancel
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loop.control.progress().cancelled


def test_launches_beyond_the_last_step_compute_nothing(runtime: ModuleType) -> None:
    run, loop, buckets = emulated_run(runtime)
    run_form(loop, "step", buckets, run.plan.steps + 2)
    assert len(buckets.log) == run.plan.steps
    assert torch.equal(loop["latents"], run.cpu.latents[-1])
    assert not loop.control.progress().cancelled


@pytest.mark.parametrize("form", GRAPH_FORMS)
def test_cancel_before_the_device_starts_stops_that_run(runtime: ModuleType, form: str) -> None:
    """Everything is queued and cancelled before the device does anything."""
    run, loop, buckets = emulated_run(runtime)
    graph = runtime.StepGraph(loop.control, buckets.graphs, form, owner=buckets)
    run_form(loop, form, buckets, run.plan.steps)  # a run before it
    loop.load(run.plan, run.cpu.latents[0])
    buckets.log.clear()
    runtime.defer(True)
    launch(graph, loop.control, form, run.plan.steps)
    loop.control.cancel()
    progress = loop.control.progress()
    assert (progress.decided, progress.finished) == (0, False)  # not those of the run before
    assert loop.control.records() == []
    runtime.run_pending()
    progress = loop.control.progress()
    assert (progress.decided, progress.finished, progress.cancelled) == (0, True, True)
    assert buckets.log == []
    assert torch.equal(loop["latents"], run.cpu.latents[0])


@pytest.mark.parametrize("form", FORMS)
def test_a_cancel_that_comes_too_late_leaves_the_next_run_alone(
    runtime: ModuleType, form: str
) -> None:
    run, loop, buckets = emulated_run(runtime)
    loop.control.cancel()  # before any run
    for _ in range(2):
        loop.load(run.plan, run.cpu.latents[0])
        run_form(loop, form, buckets, run.plan.steps)
        assert not loop.control.progress().cancelled
        assert torch.equal(loop["latents"], run.cpu.latents[-1])
        loop.control.cancel()


def test_another_thread_watches_and_cancels(runtime: ModuleType) -> None:
    """The launch lets other threads run Python, and they need no lock to look or to cancel."""
    run, loop, _ = emulated_run(runtime)
    reached, go_on = threading.Event(), threading.Event()

    def model(k: int, bucket: int, latents: torch.Tensor) -> torch.Tensor:
        if k == 3:
            reached.set()
            assert go_on.wait(60)
        return run.model(k, bucket, latents)

    buckets = EmulatedBuckets(loop, model, 3)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(run_form, loop, "loop", buckets, run.plan.steps)
        assert reached.wait(60)
        progress = loop.control.wait(3, 60.0)
        rows = loop.control.records()
        loop.control.cancel()
        go_on.set()
        done.result(60)
    assert (progress.decided, progress.finished) == (4, False)
    assert [int(values[0]) for _, values in rows] == run.cpu.buckets[:4]
    assert loop.control.progress().cancelled
    assert torch.equal(loop["latents"], run.cpu.latents[4])


def test_two_threads_run_two_loops(runtime: ModuleType) -> None:
    runs = [mixed_run(), mixed_run((1, 4, 2, 8, 24), steps=9)]

    def work(run: MixedRun) -> torch.Tensor:
        for form in FORMS:
            _, loop, buckets = emulated_run(runtime, run)
            run_form(loop, form, buckets, run.plan.steps)
            assert loop.record()[:, 0].tolist() == run.cpu.buckets
        return loop["latents"]

    with ThreadPoolExecutor(2) as pool:
        for run, latents in zip(runs, pool.map(work, runs), strict=True):
            assert torch.equal(latents, run.cpu.latents[-1])
