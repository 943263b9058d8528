"""CUDA says no, or nothing at all: what the step graph reports then, and what it leaves behind."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from step_loop import StepLoop, emulated_run, mixed_run, run_form

FORMS = ["loop", "step"]
KERNEL, CONDITIONAL = 0, 13  # cudaGraphNodeType
INVALID_VALUE = 1  # cudaErrorInvalidValue
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


def build(loop: StepLoop, graphs: list[tuple[str, int]], form: str) -> Any:
    return loop.runtime.StepGraph(loop.control, graphs, form, owner=None)


@pytest.mark.parametrize("form", FORMS)
def test_a_refusal_names_the_call_the_form_and_the_nodes_of_every_bucket(
    runtime: ModuleType, form: str
) -> None:
    _, loop, _ = emulated_run(runtime)
    nested = runtime.child_graph(runtime.typed_graph(KERNEL, 3))
    graphs = [("p", nested), ("2p", 0), ("4p", runtime.typed_graph(2, 1))]
    runtime.refuse_in_bodies(KERNEL)
    before = runtime.live_objects()
    with pytest.raises(runtime.GraphRefused) as caught:
        build(loop, graphs, form)
    assert str(caught.value) == (
        f"ddit_rt: CUDA refused the graph of the {form} form: cudaGraphInstantiateWithParams "
        "failed: cudaErrorInvalidValue, invalid argument, result 2, because of a kernel node "
        "(nodes of p: 3 kernel, 1 child graph; 2p: not captured; 4p: 1 memset)"
    )
    assert runtime.live_objects() == before


@pytest.mark.parametrize(
    ("position", "what"),
    [
        (0, "the decide kernel"),
        (1, "the SWITCH node"),
        (2, "the graph of bucket 1p"),
        (3, "an empty node for bucket 2p"),
        (5, "the update kernel"),
    ],
)
def test_a_node_that_is_refused_is_named(runtime: ModuleType, position: int, what: str) -> None:
    _, loop, buckets = emulated_run(runtime)
    graphs = [buckets.graphs[0], ("2p", 0), buckets.graphs[2]]
    runtime.fail_after("cudaGraphAddNode", position, error=INVALID_VALUE)
    with pytest.raises(runtime.GraphRefused, match=f"cudaGraphAddNode of {what} failed: .*invalid"):
        build(loop, graphs, "step")


@pytest.mark.parametrize("form", FORMS)
def test_an_upload_that_is_refused_leaves_nothing_behind(runtime: ModuleType, form: str) -> None:
    _, loop, buckets = emulated_run(runtime)
    before = runtime.live_objects()
    graph = build(loop, buckets.graphs, form)
    runtime.fail_after("cudaGraphUpload", 0, error=OUT_OF_MEMORY)
    with pytest.raises(
        runtime.GraphRefused, match=rf"the {form} form: cudaGraphUpload.*out of memory.*1 kernel"
    ):
        graph.upload(0)
    del graph
    assert runtime.live_objects() == before


@pytest.mark.parametrize("form", FORMS)
def test_a_launch_that_is_refused_has_run_nothing(runtime: ModuleType, form: str) -> None:
    """And the run can be had from the same buffers in any form."""
    run, loop, buckets = emulated_run(runtime)
    graph = build(loop, buckets.graphs, form)
    if form == "step":
        loop.control.begin(0)
    before = {name: tensor.clone() for name, tensor in loop.buffers.items()}
    runtime.fail_after("cudaGraphLaunch", 0, error=INVALID_VALUE)
    with pytest.raises(runtime.GraphRefused, match=f"the {form} form: cudaGraphLaunch.*1 kernel"):
        graph.launch(0)
    runtime.stop_failing()
    assert buckets.log == []
    for name, tensor in loop.buffers.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    if form == "step":
        loop.control.finish(0)
    for other in ("host", "loop", "step"):
        loop.load(run.plan, run.cpu.latents[0])
        run_form(loop, other, buckets, run.plan.steps)
        assert torch.equal(loop["latents"], run.cpu.latents[-1])
        assert loop.control.progress().decided == run.plan.steps


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", ["cudaGraphAddNode", "cudaGraphUpload", "cudaGraphLaunch"])
def test_a_kernel_that_failed_before_is_no_refusal(
    runtime: ModuleType, form: str, call: str
) -> None:
    """Every call reports it; another form would meet it as well."""
    _, loop, buckets = emulated_run(runtime)
    graph = build(loop, buckets.graphs, form)
    runtime.fail_after(call, 0)
    runtime.fail_after("cudaEventQuery", 0)
    calls = {
        "cudaGraphAddNode": lambda: build(loop, buckets.graphs, form),
        "cudaGraphUpload": lambda: graph.upload(0),
        "cudaGraphLaunch": lambda: graph.launch(0),
    }
    with pytest.raises(RuntimeError, match="the step loop failed: mockError") as caught:
        calls[call]()
    assert not isinstance(caught.value, runtime.GraphRefused)
    runtime.stop_failing()


@pytest.mark.parametrize("form", FORMS)
def test_an_error_behind_the_launch_is_no_refusal(runtime: ModuleType, form: str) -> None:
    """The graph runs, so no other form may start."""
    _, loop, buckets = emulated_run(runtime)
    graph = build(loop, buckets.graphs, form)
    runtime.fail_after("cudaEventRecord", 0)
    with pytest.raises(RuntimeError, match="cudaEventRecord") as caught:
        graph.launch(0)
    assert not isinstance(caught.value, runtime.GraphRefused)
    runtime.stop_failing()


def test_a_bucket_that_no_table_may_choose_has_a_body_that_does_nothing(
    runtime: ModuleType,
) -> None:
    """The mock finds bodies without nodes, in every test; here one of them is run through."""
    run, loop, buckets = emulated_run(runtime, mixed_run(forced=[0, 2, 0, 2, 2, 0, 0]))
    graphs = [buckets.graphs[0], ("2p", 0), buckets.graphs[2]]
    for form in FORMS:
        loop.load(run.plan, run.cpu.latents[0])
        run_form(loop, form, buckets, run.plan.steps, graphs=graphs)
        assert torch.equal(loop["latents"], run.cpu.latents[-1])


@pytest.mark.parametrize("form", [*FORMS, "host"])
def test_destroying_gives_up_on_a_device_that_hangs_and_takes_nothing_from_it(
    runtime: ModuleType, form: str
) -> None:
    before = runtime.live_objects()
    run, loop, buckets = emulated_run(runtime, patience=0.05)
    runtime.defer(True)
    if form == "host":
        loop.control.begin(0)
        loop.control.decide(0)
    else:
        run_form(loop, form, buckets, run.plan.steps)
    del loop, buckets  # would never return
    after = runtime.live_objects()
    graphs = 0 if form == "host" else 1
    assert {kind: after[kind] - before[kind] for kind in after} == {
        "graphs": 0,
        "executables": graphs,
        "pinned": 1,
        "events": 1,
    }
    runtime.reset()
    runtime.end_process()


def test_a_loop_that_is_abandoned_is_not_waited_for(runtime: ModuleType) -> None:
    _, loop, buckets = emulated_run(runtime, patience=float("inf"))
    graph = build(loop, buckets.graphs, "loop")
    runtime.defer(True)
    graph.launch(0)
    loop.control.abandon()
    runtime.clear_calls()
    del graph, loop
    assert runtime.calls()["cudaEventQuery"] == 2  # by each of the two, once
    assert runtime.live_objects()["pinned"] > 0
    runtime.reset()
    runtime.end_process()


def test_a_loop_that_was_abandoned_and_ended_after_all_is_freed(runtime: ModuleType) -> None:
    """The fixture finds what is left."""
    run, loop, buckets = emulated_run(runtime)
    runtime.defer(True)
    graph = build(loop, buckets.graphs, "loop")
    graph.launch(0)
    loop.control.abandon()
    runtime.run_pending()
    assert torch.equal(loop["latents"], run.cpu.latents[-1])
