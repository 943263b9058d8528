"""What `StepControl` takes and refuses, and what it tells while a run is under way."""

from __future__ import annotations

import time
import weakref
from types import ModuleType
from typing import Any

import pytest
import torch
from step_loop import (
    LoopPlan,
    StepLoop,
    addresses,
    emulated_run,
    make_buffers,
    multistep,
    plan_of,
)

from ddit_rt.ops import Reason


def make(
    runtime: ModuleType,
    plan: LoopPlan,
    changes: dict[str, int | None] | None = None,
    **options: Any,
) -> Any:
    """A control whose addresses (None: left out) or options are changed."""
    buffers = make_buffers(runtime, plan, plan.steps)
    given: dict[str, int | None] = {**addresses(buffers), **(changes or {})}
    complete = {
        "shape": list(plan.shape),
        "sizes": list(plan.sizes),
        "velocity_type": "float32",
        "velocity_slots": plan.velocity_slots,
        "capacity": plan.steps,
        "device": 0,
        "owner": buffers,
        **options,
    }
    return runtime.StepControl({k: v for k, v in given.items() if v is not None}, **complete)


NAMES = [
    *("latents", "past", "velocity", "past_velocities", "coefficients", "forced", "thresholds"),
    *("moments", "keys", "scores", "state", "settings"),
]


CACHE_NAMES = ["increments", "signal", "cache"]


@pytest.mark.parametrize("name", [*NAMES, *CACHE_NAMES])
def test_an_address_that_is_missing_is_named(runtime: ModuleType, name: str) -> None:
    with pytest.raises(ValueError, match=f"no address for {name}"):
        make(runtime, plan_of(), {name: None})


def test_an_address_that_nobody_asked_for_is_named(runtime: ModuleType) -> None:
    with pytest.raises(ValueError, match="unknown buffer latent$"):
        make(runtime, plan_of(), {"latent": 16})


@pytest.mark.parametrize("name", NAMES)
def test_an_address_of_zero_is_refused_where_it_is_needed(runtime: ModuleType, name: str) -> None:
    with pytest.raises(ValueError, match=r"has no address|no buffers? for"):
        make(runtime, plan_of(coefficients=multistep(3, 2)), {name: 0})


@pytest.mark.parametrize("name", ["signal", "cache"])
def test_a_step_cache_needs_its_buffers(runtime: ModuleType, name: str) -> None:
    given: dict[str, int | None] = {"increments": 16, "signal": 16, "cache": 16}
    for changes, rows in (({**given, name: 0}, 1), (given, 0)):
        with pytest.raises(ValueError, match="a step cache, but no buffers"):
            make(runtime, plan_of(), changes, cache_rows=rows)


@pytest.mark.parametrize("stages", [0, 2])
def test_stages_need_a_table(runtime: ModuleType, stages: int) -> None:
    with pytest.raises(ValueError, match=f"{stages} stages, but no table"):
        make(runtime, plan_of(), {"stages": 0}, stages=stages)


def test_buffers_that_a_loop_does_not_need_may_be_absent(runtime: ModuleType) -> None:
    unneeded = ("past_velocities", "thresholds", "moments", "keys", "scores")
    make(runtime, plan_of(sizes=()), dict.fromkeys(unneeded, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": [1, 2, 8, 8]}, r"a latent shape is \[B, C, F, H, W\]"),
        ({"shape": [1, 2, 0, 8, 8]}, "1 x 2 x 0 x 8 x 8, expected positive sizes"),
        ({"sizes": [0]}, "patch size 0, expected at least 1"),
        ({"sizes": [-4]}, "patch size -4, expected at least 1"),
        ({"sizes": [1] * 9}, "9 patch sizes, expected at most 8"),
        ({"shape": [1, 1, 1, 8, 8], "sizes": [1]}, "no standard deviation"),
        ({"shape": [1, 1, 1, 9, 9], "sizes": [4]}, "no standard deviation"),
        ({"velocity_type": "float64"}, "'float64', expected float32, bfloat16 or float16"),
        ({"velocity_slots": 0}, "0 velocities, expected 1 to 3"),
        ({"velocity_slots": 4}, "4 velocities, expected 1 to 3"),
        ({"capacity": 0}, "tables for no step"),
    ],
)
def test_refuses_with_what_came_and_what_was_expected(
    runtime: ModuleType, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(runtime, plan_of(), **options)
    assert "cudaHostAlloc" not in runtime.calls()


@pytest.mark.parametrize(
    ("shape", "sizes", "expected"),
    [
        ([1, 16, 1, 128, 128], [4, 8], (2 * 1024, 2 * 1024)),
        ([2, 16, 3, 12, 20], [4], (2 * 2 * 3 * 15, 2 * 3 * 15)),
        ([1, 4, 1, 96, 96], [96], (2 * 9, 9)),  # base patches of 32: the widest that a tile holds
        ([1, 4, 1, 96, 96], [], (0, 0)),
        ([1, 16, 21, 90, 160], [4, 8], (2 * 21 * 23 * 40, 2 * 21 * 23 * 40)),
    ],
)
def test_scratch_sizes(
    runtime: ModuleType, shape: list[int], sizes: list[int], expected: tuple[int, int]
) -> None:
    assert runtime.scratch_sizes(shape, sizes) == expected


def test_the_owner_lives_as_long_as_the_control(runtime: ModuleType) -> None:
    loop = StepLoop(runtime, plan_of())
    control, held = loop.control, weakref.ref(loop["state"])
    del loop
    assert held() is not None
    del control
    assert held() is None


def test_before_any_run_nothing_is_decided(runtime: ModuleType) -> None:
    control = StepLoop(runtime, plan_of()).control
    progress = control.progress()
    assert (progress.decided, progress.finished) == (0, False)
    assert (progress.cancelled, progress.nonfinite) == (False, False)
    assert control.records() == []
    for step in (0, 1, -1):
        with pytest.raises(ValueError, match=f"step {step} is not decided yet"):
            control.bucket(step)


def test_progress_is_not_that_of_the_run_before(runtime: ModuleType) -> None:
    """From the launch on, although the device has not begun."""
    run, loop, buckets = emulated_run(runtime)
    loop.run_host(run.plan.steps, buckets.replay)
    assert loop.control.progress().finished
    runtime.defer(True)
    loop.control.begin(0)
    assert not loop.control.progress().finished
    assert loop.control.progress().decided == 0
    assert loop.control.records() == []
    loop.control.finish(0)
    runtime.run_pending()
    assert loop.control.progress().finished


def test_wait_returns_when_there_is_nothing_new(runtime: ModuleType) -> None:
    loop = StepLoop(runtime, plan_of())
    runtime.defer(True)
    loop.load(plan_of(), torch.zeros(1, 2, 1, 8, 8))
    loop.control.begin(0)
    loop.control.decide(0)
    before = time.monotonic()
    assert loop.control.wait(0, 0.02).decided == 0
    assert time.monotonic() - before >= 0.02
    runtime.run_pending()
    assert loop.control.wait(0, 60.0).decided == 1
    assert loop.control.wait(1, 0.0).decided == 1
    loop.control.finish(0)
    runtime.run_pending()
    assert loop.control.wait(100, 60.0).finished


def test_wait_raises_what_the_device_reports(runtime: ModuleType) -> None:
    loop = StepLoop(runtime, plan_of())
    loop.control.begin(0)
    runtime.fail_after("cudaEventQuery", 0)
    with pytest.raises(RuntimeError, match="the step loop failed: mockError"):
        loop.control.wait(0, 0.0)
    runtime.stop_failing()


@pytest.mark.parametrize("call", ["cudaLaunchKernel", "cudaEventRecord"])
@pytest.mark.parametrize("form", ["begin", "loop"])
def test_a_launch_that_failed_does_not_confuse_the_next_run(
    runtime: ModuleType, call: str, form: str
) -> None:
    """Host and device count runs alike, whether the begin kernel was queued or not."""
    run, loop, buckets = emulated_run(runtime)
    graph = runtime.StepGraph(loop.control, buckets.graphs, "loop", owner=buckets)
    call = "cudaGraphLaunch" if (call, form) == ("cudaLaunchKernel", "loop") else call
    runtime.fail_after(call, 0)
    with pytest.raises(RuntimeError, match=f"{call}.*failed"):
        loop.control.begin(0) if form == "begin" else graph.launch(0)
    runtime.stop_failing()
    loop.load(run.plan, run.cpu.latents[0])
    graph.launch(0)
    assert loop.control.progress().finished
    assert loop.control.progress().decided == run.plan.steps
    assert torch.equal(loop["latents"], run.cpu.latents[-1])
    assert loop.record()[3:, 1].tolist() != [Reason.FORCED] * 4
