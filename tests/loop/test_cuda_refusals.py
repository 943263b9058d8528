"""CUDA refuses: the next slower form takes over, announced once, and a run is never half a run."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated_graphs import EmulatedGraph, EmulatedGraphs
from models import noise
from scripted_runs import MIXED, SHAPE, assert_same_run, euler, scripted_plan

from ddit_rt.errors import CaptureError
from ddit_rt.loop import CpuExecutor, CudaExecutor, RunPlan
from ddit_rt.policies import FinePolicy, StaticPolicy

KERNEL, CONDITIONAL = 0, 13  # cudaGraphNodeType
INVALID_VALUE, OUT_OF_MEMORY = 1, 2  # cudaError_t
NODES = "nodes of p: 1 kernel; 2p: 1 kernel; 4p: 1 kernel"


def mixed(seed: int = 0) -> RunPlan:
    return scripted_plan(MIXED, euler(8), seed=seed)


def assert_runs(
    executor: CudaExecutor, form: str, *, plan: RunPlan | None = None, **options: Any
) -> list[str]:
    """The run has the CPU's bits and took this form; returns its warnings."""
    plan = plan or mixed()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = executor.run(plan, noise(*SHAPE), **options)
    assert_same_run(actual, CpuExecutor().run(plan, noise(*SHAPE), **options))
    assert actual[1].executor == f"cuda-{form}"
    return [str(warning.message) for warning in caught]


def assert_announced(graphs: EmulatedGraphs, form: str, *reasons: str) -> CudaExecutor:
    """A run falls back to this form with one warning and a note, a second one with the note."""
    executor = CudaExecutor(graphs)
    (warning,) = assert_runs(executor, form)
    for reason in (f'"{form}" runs instead of "loop"', *reasons):
        assert reason in warning
    calls = graphs.runtime.calls()
    assert assert_runs(executor, form) == []
    assert graphs.runtime.calls().get("cudaGraphCreate") == calls["cudaGraphCreate"]
    _, trace = executor.run(mixed(), noise(*SHAPE))
    (note,) = trace.notes
    for reason in (f"executor: {form} instead of loop", *reasons):
        assert reason in note
    return executor


@pytest.mark.parametrize(
    ("node", "form", "reasons"),
    [
        (
            CONDITIONAL,
            "step",
            [
                "the loop form: cudaGraphInstantiateWithParams failed: cudaErrorInvalidValue",
                "because of a conditional node",
            ],
        ),
        (KERNEL, "host", ["the loop form:", "the step form:", "a kernel node"]),
    ],
)
def test_a_graph_that_cannot_be_instantiated_gives_way(
    graphs: EmulatedGraphs, node: int, form: str, reasons: list[str]
) -> None:
    """Where the step form cannot be either, the host takes over."""
    graphs.runtime.refuse_in_bodies(node)
    assert_announced(graphs, form, *reasons, NODES)


@pytest.mark.parametrize(
    "call", ["cudaGraphCreate", "cudaGraphAddNode", "cudaGraphConditionalHandleCreate"]
)
def test_a_loop_that_cannot_be_built_gives_way_to_the_step_form(
    graphs: EmulatedGraphs, call: str
) -> None:
    graphs.runtime.fail_after(call, 0, times=1, error=INVALID_VALUE)
    assert_announced(graphs, "step", f"the loop form: {call}", "invalid argument", NODES)


def test_a_loop_that_cannot_be_uploaded_gives_way_to_the_step_form(graphs: EmulatedGraphs) -> None:
    before = graphs.runtime.live_objects()["executables"]
    graphs.runtime.fail_after("cudaGraphUpload", 0, times=1, error=OUT_OF_MEMORY)
    executor = assert_announced(graphs, "step", "cudaGraphUpload", "out of memory", NODES)
    assert graphs.runtime.live_objects()["executables"] == before + 1
    del executor
    assert graphs.runtime.live_objects()["executables"] == before


@pytest.mark.parametrize(("times", "form"), [(1, "step"), (2, "host")])
def test_a_launch_that_is_refused_gives_way_before_anything_has_run(
    graphs: EmulatedGraphs, times: int, form: str
) -> None:
    before = graphs.runtime.live_objects()["executables"]
    executor = CudaExecutor(graphs)
    done: list[int] = []
    graphs.runtime.fail_after("cudaGraphLaunch", 0, times=times, error=INVALID_VALUE)
    messages = assert_runs(executor, form, on_progress=done.append)
    assert done == 2 * list(range(8))  # this run's, and the CPU's
    assert len(messages) == times  # the second refusal comes when the step form was announced
    assert all("cudaGraphLaunch" in message and NODES in message for message in messages)
    assert graphs.runtime.live_objects()["executables"] == before + (form == "step")
    assert assert_runs(executor, form) == []


def test_a_launch_that_is_refused_in_a_later_run_gives_way(graphs: EmulatedGraphs) -> None:
    executor = CudaExecutor(graphs)
    assert assert_runs(executor, "loop") == []
    graphs.runtime.fail_after("cudaGraphLaunch", 0, times=1)
    assert len(assert_runs(executor, "step", plan=mixed(seed=3))) == 1
    assert assert_runs(executor, "step", plan=mixed(seed=4)) == []


def test_a_later_step_that_cannot_be_launched_ends_the_run(graphs: EmulatedGraphs) -> None:
    """What came before has run, so the run cannot start anew; the executor can."""
    executor = CudaExecutor(graphs, "step")
    graphs.runtime.fail_after("cudaGraphLaunch", 2)
    with pytest.raises(CaptureError, match=f"step 2 could not be launched: .*{NODES}"):
        executor.run(mixed(), noise(*SHAPE))
    graphs.runtime.stop_failing()
    assert assert_runs(executor, "step") == []


def test_an_error_behind_the_launch_of_a_loop_tells_the_device_to_stop(
    graphs: EmulatedGraphs,
) -> None:
    """The graph is on its way, on buffers that the next run writes to."""
    executor = CudaExecutor(graphs, "loop")
    executor.run(mixed(), noise(*SHAPE))
    (loop,) = executor._loops.values()
    graphs.runtime.defer(True)
    graphs.runtime.fail_after("cudaEventRecord", 0)
    with pytest.raises(RuntimeError, match="cudaEventRecord"):
        executor.run(mixed(), noise(*SHAPE))
    graphs.runtime.stop_failing()
    graphs.runtime.run_pending()
    graphs.runtime.defer(False)
    assert loop.control.progress().cancelled
    assert assert_runs(executor, "loop") == []


@pytest.mark.parametrize("form", ["loop", "step"])
@pytest.mark.parametrize("call", ["cudaGraphInstantiateWithParams", "cudaGraphLaunch"])
def test_a_form_that_was_asked_for_raises_and_is_not_tried_again(
    graphs: EmulatedGraphs, form: str, call: str
) -> None:
    executor = CudaExecutor(graphs, form)
    graphs.runtime.fail_after(call, 0)
    expected = rf'executor="{form}" cannot run here: .*{call}.*{NODES}.*executor="auto"'
    with pytest.raises(CaptureError, match=expected):
        executor.run(mixed(), noise(*SHAPE))
    graphs.runtime.clear_calls()
    with pytest.raises(CaptureError, match=expected):
        executor.run(mixed(), noise(*SHAPE))
    assert not {"cudaGraphCreate", "cudaGraphLaunch"} & set(graphs.runtime.calls())
    executor.form = "host"
    assert assert_runs(executor, "host") == []


def test_a_form_stays_refused_when_buckets_are_added(graphs: EmulatedGraphs) -> None:
    graphs.runtime.refuse_in_bodies(CONDITIONAL)
    executor = CudaExecutor(graphs)
    fine = scripted_plan(FinePolicy(), euler(8))
    (message,) = assert_runs(executor, "step", plan=fine)
    assert "p: 1 kernel; 2p: not captured" in message
    graphs.runtime.clear_calls()
    assert assert_runs(executor, "step") == []
    assert graphs.runtime.calls()["cudaGraphCreate"] == 1  # the step form with its new buckets


def test_another_shape_tries_again_and_repeats_no_warning(graphs: EmulatedGraphs) -> None:
    """It may be memory that is short; but what is known is not said twice."""
    executor, wide = CudaExecutor(graphs), (1, 4, 16, 32)
    graphs.runtime.fail_after("cudaGraphInstantiateWithParams", 0, times=1, error=OUT_OF_MEMORY)
    assert len(assert_runs(executor, "step")) == 1
    _, trace = executor.run(scripted_plan(MIXED, euler(8), shape=wide), noise(*wide))
    assert trace.executor == "cuda-loop"
    graphs.runtime.fail_after("cudaGraphInstantiateWithParams", 0, times=1, error=OUT_OF_MEMORY)
    wider = (1, 4, 16, 48)
    _, trace = executor.run(scripted_plan(MIXED, euler(8), shape=wider), noise(*wider))
    assert trace.executor == "cuda-step"


def test_a_failed_device_is_not_taken_for_a_refusal(graphs: EmulatedGraphs) -> None:
    executor = CudaExecutor(graphs)
    graphs.runtime.fail_after("cudaGraphLaunch", 0)
    graphs.runtime.fail_after("cudaEventQuery", 0)
    with pytest.raises(RuntimeError, match="the step loop failed"):
        executor.run(mixed(), noise(*SHAPE))
    graphs.runtime.stop_failing()


def test_graphs_whose_nodes_cannot_be_listed_are_replayed_by_the_host(
    graphs: EmulatedGraphs,
) -> None:
    graphs.runtime.fail_after("cudaGraphGetNodes", 0)
    executor = CudaExecutor(graphs)
    (message,) = assert_runs(executor, "host")
    assert "cudaGraphGetNodes" in message
    assert executor.captures[0].nodes == {}


class ShortOfMemory(EmulatedGraphs):
    """Graphs of which one bucket cannot be captured.

    Attributes:
        bucket: Which one; empty: none.
        error: Makes what capturing raises.
    """

    bucket = ""
    error: Callable[[], Exception]

    def capture(self, name: str, body: Any) -> EmulatedGraph:
        if name == self.bucket:
            raise self.error()
        return super().capture(name, body)


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def wrapped() -> Exception:
    """As torch ends a capture in which memory ran out: with an error of its own."""
    error = CaptureError("the step at 2p cannot be captured in a CUDA graph")
    error.__cause__ = RuntimeError("operation failed due to a previous error during capture")
    error.__cause__.__context__ = torch.OutOfMemoryError("Allocation on device 0")
    return error


@pytest.mark.parametrize(
    ("form", "error"),
    [("auto", out_of_memory), ("loop", wrapped), ("step", out_of_memory), ("host", wrapped)],
)
def test_a_capture_without_memory_names_shape_and_bucket(
    graphs: EmulatedGraphs, form: str, error: Callable[[], Exception]
) -> None:
    short = ShortOfMemory(graphs.runtime)
    short.bucket, short.error = "2p", error
    executor = CudaExecutor(short, form)
    gc.collect()
    before = graphs.runtime.live_objects()["pinned"]
    with pytest.raises(
        CaptureError,
        match=r"out of memory while capturing 2p for latents of 1 x 4 x 16 x 16: run a smaller",
    ):
        executor.run(mixed(), noise(*SHAPE))
    assert executor.captures == ()
    gc.collect()  # the error's frames
    assert graphs.runtime.live_objects()["pinned"] == before, "the memory is free again"
    short.bucket = ""
    assert assert_runs(executor, "loop" if form == "auto" else form) == []


def test_buffers_without_memory_name_the_shape(graphs: EmulatedGraphs) -> None:
    graphs.runtime.fail_after("cudaHostAlloc", 0, error=OUT_OF_MEMORY)
    with pytest.raises(
        CaptureError, match="capturing the step loop's buffers for latents of 1 x 4"
    ):
        CudaExecutor(graphs).run(mixed(), noise(*SHAPE))
    graphs.runtime.stop_failing()


def test_another_error_of_a_capture_is_left_as_it_is(graphs: EmulatedGraphs) -> None:
    short = ShortOfMemory(graphs.runtime)
    short.bucket = "2p"
    short.error = lambda: CaptureError("the step at 2p draws random numbers")
    with pytest.raises(CaptureError, match=r"^the step at 2p draws random numbers$"):
        CudaExecutor(short).run(mixed(), noise(*SHAPE))


@pytest.mark.parametrize("form", ["loop", "step"])
def test_a_capture_that_fails_midway_leaves_no_graph_without_its_buckets(
    graphs: EmulatedGraphs, form: str
) -> None:
    """2p was captured before 4p failed; the graph that is there knows neither."""
    short = ShortOfMemory(graphs.runtime)
    executor = CudaExecutor(short, form)
    assert_runs(executor, form, plan=scripted_plan(StaticPolicy("p"), euler(8)))
    short.bucket, short.error = "4p", out_of_memory
    with pytest.raises(CaptureError, match="4p"):
        executor.run(
            scripted_plan(StaticPolicy(["p", "2p", "4p", *"ppppp"]), euler(8)), noise(*SHAPE)
        )
    plan = scripted_plan(StaticPolicy(["p", "2p"] * 4), euler(8))
    assert assert_runs(executor, form, plan=plan) == []
