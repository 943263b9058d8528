"""The graph that chooses buckets on the device: what it looks like, refuses, and leaves behind."""

from __future__ import annotations

import itertools
import weakref
from types import ModuleType
from typing import Any

import pytest
import torch
from step_loop import StepLoop, emulated_run, launch, mixed_run, plan_of, run_form

FORMS = ["loop", "step"]

STEP = """\
decide
SWITCH < decide
  body 0
    child
      model
  body 1
    empty
  body 2
    child
      model
update<float32, 4> < SWITCH"""

LOOP = f"""\
begin
WHILE < begin
{chr(10).join("  " + line for line in STEP.splitlines())}
finish < WHILE"""


def make_loop(runtime: ModuleType) -> StepLoop:
    """A loop of three buckets. Not a fixture, which would outlive the check for what is left."""
    return StepLoop(runtime, plan_of(sizes=(4, 8)))


def build(loop: StepLoop, graphs: list[int] | None = None, form: str = "step") -> Any:
    """A step graph of buckets p, 2p, 4p; by default each is one kernel."""
    if graphs is None:
        graphs = [loop.runtime.typed_graph(0, 1) for _ in range(3)]
    named = list(zip(["p", "2p", "4p"], graphs, strict=False))
    return loop.runtime.StepGraph(loop.control, named, form, owner=None)


@pytest.mark.parametrize(("form", "expected"), [("step", STEP), ("loop", LOOP)])
def test_topology_with_a_bucket_that_no_table_may_choose(
    runtime: ModuleType, form: str, expected: str
) -> None:
    loop = make_loop(runtime)
    graphs = [runtime.call_graph(lambda: None), 0, runtime.call_graph(lambda: None)]
    graph = build(loop, graphs, form)
    assert runtime.describe() == expected.splitlines()
    del graph
    assert runtime.describe() == []


def test_nodes_are_counted_through_child_graphs(runtime: ModuleType) -> None:
    inner = runtime.child_graph(runtime.typed_graph(2, 3))
    assert runtime.count_nodes(inner) == {"child graph": 1, "memset": 3}
    assert runtime.count_nodes(runtime.typed_graph(77, 1)) == {"type 77": 1}


@pytest.mark.parametrize("type_", [0, 1, 2, 5])
def test_nodes_that_a_body_may_hold_are_taken(runtime: ModuleType, type_: int) -> None:
    graph = runtime.typed_graph(type_, 2)
    build(make_loop(runtime), [graph, runtime.child_graph(graph), graph])


FORBIDDEN = [
    (3, "host function", "calls back to the host"),
    (6, "event wait", "run_single_threaded=True"),
    (7, "event record", "run_single_threaded=True"),
    (8, "semaphore signal", "graphics interoperation"),
    (9, "semaphore wait", "graphics interoperation"),
    (10, "memory allocation", "native caching allocator"),
    (11, "memory release", "native caching allocator"),
    (13, "conditional", "torch.cond"),
    (77, "type 77", "a newer CUDA feature"),
]


@pytest.mark.parametrize(
    ("form", "type_", "name", "cause"),
    [(FORMS[place % 2], *row) for place, row in enumerate(FORBIDDEN)],
)
def test_nodes_that_a_body_may_not_hold_are_refused_by_name(
    runtime: ModuleType, form: str, type_: int, name: str, cause: str
) -> None:
    loop = make_loop(runtime)
    good, bad = runtime.typed_graph(0, 1), runtime.typed_graph(type_, 2)
    for graph in (bad, runtime.child_graph(runtime.child_graph(bad))):
        with pytest.raises(runtime.NodeRefused) as caught:
            build(loop, [good, good, graph], form)
        message = str(caught.value)
        assert f"bucket 4p has 2 {name} node(s)" in message
        assert cause in message
    assert "cudaGraphCreate" not in runtime.calls()


@pytest.mark.parametrize(
    ("driver", "found"),
    [(12040, "the driver supports CUDA 12.4"), (0, "there is no CUDA driver")],
)
def test_too_old_a_driver_is_named_with_what_is_needed(
    runtime: ModuleType, driver: int, found: str
) -> None:
    loop = make_loop(runtime)
    assert runtime.switch_problem() == ""
    runtime.set_driver(driver)
    with pytest.raises(runtime.SwitchUnavailable) as caught:
        build(loop)
    assert found in str(caught.value)
    assert "CUDA 12.8 or newer (r570)" in str(caught.value)
    assert runtime.switch_problem() in str(caught.value)


def test_a_number_of_buckets_that_does_not_fit_the_sizes_is_refused(runtime: ModuleType) -> None:
    """Too few, and a decision could run nothing."""
    loop = make_loop(runtime)
    good = runtime.typed_graph(0, 1)
    with pytest.raises(ValueError, match="0 buckets, expected 3: the base patch and 2 sizes"):
        build(loop, [])
    with pytest.raises(ValueError, match="2 buckets, expected 3"):
        build(loop, [good, good])


def test_unknown_form_is_refused(runtime: ModuleType) -> None:
    with pytest.raises(ValueError, match="form 'image', expected loop or step"):
        build(make_loop(runtime), form="image")


@pytest.mark.parametrize("form", FORMS)
def test_a_call_that_fails_at_any_point_leaves_nothing_behind(
    runtime: ModuleType, form: str
) -> None:
    loop = make_loop(runtime)
    before = runtime.live_objects()
    graphs = [runtime.child_graph(runtime.typed_graph(0, 1)) for _ in range(3)]
    runtime.clear_calls()
    graph = build(loop, graphs, form)
    points = runtime.calls()
    del graph
    assert len(points) == 7
    for name, count in points.items():
        for successes in range(count):
            runtime.fail_after(name, successes)
            with pytest.raises(runtime.GraphRefused, match=f"{name}.*failed.*the mock refused"):
                build(loop, graphs, form)
            runtime.stop_failing()
            assert runtime.live_objects() == before
    build(loop, graphs, form)


def test_a_control_that_cannot_be_made_leaves_nothing_behind(runtime: ModuleType) -> None:
    before = runtime.live_objects()
    for name in ("cudaHostAlloc", "cudaHostGetDevicePointer", "cudaEventCreateWithFlags"):
        runtime.fail_after(name, 0)
        with pytest.raises(RuntimeError, match=f"{name}.*failed: mockError, the mock refused"):
            make_loop(runtime)
        runtime.stop_failing()
        assert runtime.live_objects() == before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", list(itertools.permutations(["control", "graph", "captured"])))
def test_parts_may_go_in_any_order(runtime: ModuleType, form: str, order: tuple[str, ...]) -> None:
    """What is left goes on working, and keeps the buffers."""
    run, loop, buckets = emulated_run(runtime)
    parts = {
        "control": loop.control,
        "graph": runtime.StepGraph(loop.control, buckets.graphs, form, owner=buckets),
        "captured": [raw for _, raw in buckets.graphs],
    }
    latents = loop["latents"]
    held = weakref.ref(loop["keys"])
    del loop, buckets
    for name in order:
        if name == "captured":
            for raw in parts[name]:
                runtime.destroy_graph(raw)
        del parts[name]
        if "graph" in parts and (form == "loop" or "control" in parts):
            latents.copy_(run.cpu.latents[0])
            launch(parts["graph"], parts.get("control"), form, run.plan.steps)
            assert torch.equal(latents, run.cpu.latents[-1])
    assert held() is None


def test_a_graph_keeps_the_buffers_of_its_control(runtime: ModuleType) -> None:
    loop = make_loop(runtime)
    held = weakref.ref(loop["latents"])
    graph = build(loop)
    del loop
    assert held() is not None
    del graph
    assert held() is None


@pytest.mark.parametrize("form", FORMS)
def test_destroying_waits_for_what_is_still_running(runtime: ModuleType, form: str) -> None:
    """The mock finds memory that goes before a launch that may use it has been waited for."""
    run, loop, buckets = emulated_run(runtime)
    latents = loop["latents"]
    runtime.defer(True, queries=5)
    run_form(loop, form, buckets, run.plan.steps)
    del loop, buckets
    assert torch.equal(latents, run.cpu.latents[-1])


def test_two_controls_do_not_disturb_each_other(runtime: ModuleType) -> None:
    parts = []
    for planned in (mixed_run(), mixed_run((1, 4, 2, 8, 24), steps=9)):
        run, loop, buckets = emulated_run(runtime, planned)
        graph = runtime.StepGraph(loop.control, buckets.graphs, "step", owner=buckets)
        parts.append((loop, graph, run))
        loop.control.begin(0)
    for step in range(9):
        for _, graph, run in parts:
            if step < run.plan.steps:
                graph.launch(0)
    for loop, _, run in parts:
        loop.control.finish(0)
        assert torch.equal(loop["latents"], run.cpu.latents[-1])
        assert loop.record()[:, 0].tolist() == run.cpu.buckets
        assert loop.control.progress().finished


@pytest.mark.parametrize("form", [*FORMS, "host"])
def test_everything_runs_on_the_device_of_the_control(runtime: ModuleType, form: str) -> None:
    """The mock also refuses events and graphs that are used on another device than theirs."""
    run, loop, buckets = emulated_run(runtime, index=1)
    run_form(loop, form, buckets, run.plan.steps)
    assert runtime.launch_devices() == {1}
    assert torch.equal(loop["latents"], run.cpu.latents[-1])
    with pytest.raises(RuntimeError, match="cudaSetDevice"):
        StepLoop(runtime, run.plan, index=2)
