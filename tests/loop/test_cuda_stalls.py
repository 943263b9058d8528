"""A device that hangs: the run ends with an error, and nothing waits for ever behind it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from emulated_graphs import EmulatedGraph, EmulatedGraphs
from models import noise
from scripted_runs import SHAPE, assert_same_run, euler, first_bucket, scripted_plan

from ddit_rt.errors import StallError
from ddit_rt.loop import CachePlan, CpuExecutor, CudaExecutor, RunPlan
from ddit_rt.loop.graphs import stall_seconds
from ddit_rt.policies import CacheTable, StaticPolicy

STEPS, HANGS = 6, 2
SHORT_S = 0.05


class Hanging:
    """A device beside the host, on which step 2 of a plan does not end before `release`.

    The limit is short only once it hangs, so that a slow machine does not decide the test.
    """

    def __init__(self, graphs: EmulatedGraphs, plan: RunPlan) -> None:
        self._graphs = graphs
        self._released = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work)
        first_bucket(plan).before = self._hang

    def _work(self) -> None:
        while not self._stopped.wait(0.001):
            self._graphs.runtime.run_pending()

    def _hang(self, step: int) -> None:
        if threading.current_thread() is self._thread and step == HANGS:
            self._graphs.stall_seconds = SHORT_S
            assert self._released.wait(60)

    def release(self) -> None:
        """Lets the device go on, and waits until it has nothing to do."""
        self._graphs.stall_seconds = 60.0
        self._released.set()
        while not self._graphs.idle():
            self._stopped.wait(0.001)

    @contextmanager
    def running(self) -> Iterator[None]:
        self._graphs.runtime.defer(True)
        self._thread.start()
        try:
            yield
        finally:
            self.release()
            self._stopped.set()
            self._thread.join(60)
            self._graphs.runtime.defer(False)


def plan_of_p() -> RunPlan:
    return scripted_plan(StaticPolicy("p"), euler(STEPS))


@pytest.mark.parametrize("form", ["loop", "step"])
def test_a_step_that_hangs_ends_the_run_and_is_named(graphs: EmulatedGraphs, form: str) -> None:
    """Nothing is launched behind it; once it is over after all, the executor runs again."""
    plan, executor = plan_of_p(), CudaExecutor(graphs, form)
    device = Hanging(graphs, plan)
    done: list[int] = []
    with device.running():
        with pytest.raises(StallError) as caught:
            executor.run(plan, noise(*SHAPE), on_progress=done.append)
        message = str(caught.value)
        assert "while the device is busy" in message
        assert f'step {HANGS} of {STEPS} (p) did not end in form "{form}"' in message
        assert "more than 0.05 s, set DDIT_RT_STALL_SECONDS higher" in message
        assert done == list(range(HANGS))
        assert executor.captures == ()
        graphs.runtime.clear_calls()
        with pytest.raises(StallError, match="still busy with a run that stalled before"):
            executor.run(plan, noise(*SHAPE))
        assert graphs.runtime.calls() == {}
        device.release()
        actual = executor.run(plan, noise(*SHAPE))
    assert_same_run(actual, CpuExecutor().run(plan, noise(*SHAPE)))
    assert graphs.captured == ["p", "p"], "a loop that stalled is not used again"


@pytest.mark.parametrize("form", ["loop", "step"])
def test_an_executor_goes_without_waiting_for_a_step_that_hangs(
    graphs: EmulatedGraphs, form: str
) -> None:
    plan, executor = plan_of_p(), CudaExecutor(graphs, form)
    with Hanging(graphs, plan).running():
        with pytest.raises(StallError):
            executor.run(plan, noise(*SHAPE))
        executor.forget()
        graphs.runtime.clear_calls()
        before = graphs.runtime.live_objects()
        del executor
        assert set(graphs.runtime.calls()) == {"cudaEventQuery", "cudaGraphDestroy"}
        after = graphs.runtime.live_objects()
    for kind in ("executables", "pinned", "events"):
        assert after[kind] == before[kind], "the device may still use it"
    graphs.runtime.end_process()


@pytest.mark.parametrize("form", ["loop", "step", "host"])
def test_a_decision_that_never_comes_ends_the_run(graphs: EmulatedGraphs, form: str) -> None:
    executor = CudaExecutor(graphs, form)
    graphs.stall_seconds = SHORT_S
    graphs.runtime.defer(True)
    with pytest.raises(
        StallError, match=rf'the decision of step 0 of 6 did not end in form "{form}"'
    ):
        executor.run(plan_of_p(), noise(*SHAPE))
    graphs.runtime.run_pending()  # it was only slow: cancelled, it does no step
    graphs.runtime.defer(False)
    plan = plan_of_p()
    assert_same_run(executor.run(plan, noise(*SHAPE)), CpuExecutor().run(plan, noise(*SHAPE)))


def test_a_replay_that_hangs_ends_the_run_of_the_host(graphs: EmulatedGraphs) -> None:
    plan, executor = plan_of_p(), CudaExecutor(graphs, "host")
    runs: list[int] = []

    def hang(step: int) -> None:
        runs.append(step)
        if step == HANGS:
            graphs.stall_seconds = SHORT_S
            graphs.runtime.defer(True)

    first_bucket(plan).before = hang
    with pytest.raises(StallError, match=r'step 2 of 6 \(p\) did not end in form "host"'):
        executor.run(plan, noise(*SHAPE))
    assert runs == [0, 0, 0, 1, 2]  # two to warm up, then the run


def test_a_device_that_is_idle_and_not_done_is_told_apart(graphs: EmulatedGraphs) -> None:
    """As if the graph had run nothing."""
    executor = CudaExecutor(graphs, "loop")
    executor.run(plan_of_p(), noise(*SHAPE))
    (loop,) = executor._loops.values()

    class Nothing:
        def launch(self, stream: int) -> None:
            """Does what was asked of it."""

    loop._masters["loop"] = Nothing()
    loop.control.begin(0)
    graphs.stall_seconds = SHORT_S
    with pytest.raises(StallError, match="while the device is idle"):
        executor.run(plan_of_p(), noise(*SHAPE))


def test_time_between_the_steps_of_a_session_is_not_the_device_s(
    graphs: EmulatedGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock jumps by an hour before every step, and the device takes two looks for one."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("ddit_rt.loop.drive.time", clock)
    # With a step cache that never reuses, so that every decision is waited for.
    computes = CacheTable(increments=(math.nan,) * STEPS, threshold=0.0)
    plan = replace(plan_of_p(), cache=CachePlan(table=computes))
    graphs.runtime.defer(True, queries=2)
    session = CudaExecutor(graphs).open(plan, noise(*SHAPE), driver="test")
    for step in range(STEPS):
        now[0] += 3600.0
        graphs.runtime.defer(True, queries=2)
        session.velocity(0, session.decide(step, noise(*SHAPE)), noise(*SHAPE))
        session.end_step()
    now[0] += 3600.0
    graphs.runtime.defer(True, queries=2)
    assert len(session.close(cancelled=False)) == STEPS
    graphs.runtime.defer(False)


def test_a_session_that_stalls_is_given_up(graphs: EmulatedGraphs) -> None:
    plan, executor = plan_of_p(), CudaExecutor(graphs)
    session = executor.open(plan, noise(*SHAPE), driver="test")
    graphs.runtime.defer(True)
    graphs.stall_seconds = SHORT_S
    with pytest.raises(StallError, match="while the device is busy: the decision of step 0 of 6"):
        session.close(cancelled=True)
    assert executor.captures == ()
    assert session.close(cancelled=True).cancelled  # and waits for nothing
    with pytest.raises(StallError, match="still busy with a run that stalled before"):
        executor.open(plan, noise(*SHAPE), driver="test")
    graphs.runtime.run_pending()
    graphs.runtime.defer(False)
    graphs.stall_seconds = 60.0
    executor.open(plan, noise(*SHAPE), driver="test").close(cancelled=True)


class HangsInWarmUp(EmulatedGraphs):
    """Graphs of which the next is not captured, because its warm-up does not end."""

    hangs = True

    def capture(self, name: str, body: Callable[[], None]) -> EmulatedGraph:
        if self.hangs:
            raise StallError(f"the step at {name} did not end")
        return super().capture(name, body)

    def idle(self) -> bool:
        return not self.hangs


def test_a_warm_up_that_hangs_is_not_tried_again_behind_itself(graphs: EmulatedGraphs) -> None:
    hanging = HangsInWarmUp(graphs.runtime)
    executor = CudaExecutor(hanging)
    with pytest.raises(StallError, match="the step at p did not end"):
        executor.run(plan_of_p(), noise(*SHAPE))
    with pytest.raises(StallError, match="still busy"):
        executor.run(plan_of_p(), noise(*SHAPE))
    hanging.hangs = False
    plan = plan_of_p()
    assert_same_run(executor.run(plan, noise(*SHAPE)), CpuExecutor().run(plan, noise(*SHAPE)))


@pytest.mark.parametrize(
    ("text", "seconds"), [(None, 120.0), ("", 120.0), ("7.5", 7.5), ("inf", float("inf"))]
)
def test_the_limit_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, text: str | None, seconds: float
) -> None:
    monkeypatch.delenv("DDIT_RT_STALL_SECONDS", raising=False)
    if text is not None:
        monkeypatch.setenv("DDIT_RT_STALL_SECONDS", text)
    assert stall_seconds() == seconds


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", "1,5"])
def test_a_limit_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DDIT_RT_STALL_SECONDS", text)
    with pytest.raises(ValueError, match=f'DDIT_RT_STALL_SECONDS="{text}", expected a positive'):
        stall_seconds()
