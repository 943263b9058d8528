"""The CUDA executor: one graph per bucket, and the next bucket chosen on the device.

Three forms run the same kernels and the same captured buckets, and agree to the bit:

- `loop`: one graph holds the whole loop; one launch per image.
- `step`: one graph holds a step and is launched N times back to back; between two launches a
  callback may work on the latents.
- `host`: the host reads each decision and replays that bucket's graph. For drivers that cannot
  switch, for profilers, and as the reference.
"""

from __future__ import annotations

import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ddit_rt.errors import CaptureError
from ddit_rt.executor.base import ProgressCallback, RunPlan, StepCallback
from ddit_rt.executor.capture import CapturedLoop, CaptureReport
from ddit_rt.executor.graphs import GraphDevice
from ddit_rt.executor.ranges import Ranges, ranges
from ddit_rt.executor.trace import RunTrace, build_trace
from ddit_rt.patch_scheduler import patch_name

FORMS = ("auto", "loop", "step", "host")

_KEPT = 8
"""Shapes that stay captured; the one that was not used for longest makes room."""

_POLL_SECONDS = 0.02
"""How often the host looks up while it waits for a run."""


class CudaExecutor:
    """Runs the step loop on the device. Shapes that it has seen are captured once.

    Attributes:
        form: `"loop"`, `"step"`, `"host"`; or `"auto"`, `loop` unless a callback needs the latents
            between steps. May be set between runs.
    """

    def __init__(self, graphs: GraphDevice, form: str = "auto") -> None:
        self.form = form
        self._graphs = graphs
        self._loops: OrderedDict[Hashable, CapturedLoop] = OrderedDict()
        self._host_only = ""

    @property
    def captures(self) -> tuple[CaptureReport, ...]:
        """What capturing took, for every shape that is captured now."""
        return tuple(loop.report for loop in self._loops.values())

    def forget(self) -> None:
        """Drops every captured graph, because the weights that they read are elsewhere now."""
        self._loops.clear()

    @torch.no_grad()
    def run(
        self,
        plan: RunPlan,
        latents: Tensor,
        *,
        on_step_end: StepCallback | None = None,
        on_progress: ProgressCallback | None = None,
        should_stop: Callable[[], bool] | None = None,
        annotate: bool = False,
    ) -> tuple[Tensor, RunTrace]:
        """See `Executor.run`.

        Raises:
            CaptureError: A bucket cannot be captured, or not in the form that was asked for.
        """
        mark = ranges(annotate)
        with self._graphs.on_stream() as stream:
            loop = self._loop(plan, latents.shape)
            loop.load(plan, latents)
            form, notes = self._choose(loop, stream, on_step_end is not None)
            run = _Run(plan, loop, stream, on_step_end, on_progress, should_stop, mark)
            with mark("run"):
                run.drive(form)
        return loop.buffers.latents.clone(), self._trace(plan, loop, form, notes, latents.shape[0])

    def _loop(self, plan: RunPlan, shape: torch.Size) -> CapturedLoop:
        """The captured loop of this shape, made if need be."""
        tensors = tuple((tensor.shape, tensor.dtype) for tensor in plan.shared)
        key = (
            shape,
            plan.offered,
            plan.capacity,
            plan.solver.velocity_depth,
            plan.stage_names,
            tensors,
            plan.weights,
            plan.cache is not None,
            plan.cache is not None and plan.cache.signal is not None,
        )
        if key not in self._loops:
            while len(self._loops) >= _KEPT:
                self._loops.popitem(last=False)
            self._loops[key] = CapturedLoop(self._graphs, plan, shape)
        self._loops.move_to_end(key)
        return self._loops[key]

    def _choose(
        self, loop: CapturedLoop, stream: int, needs_latents: bool
    ) -> tuple[str, tuple[str, ...]]:
        """The form to run, and why it is not the fastest one."""
        form, notes = self.form, []
        if form in ("auto", "loop") and needs_latents:
            notes.append(
                "executor: step instead of loop, because a callback needs the latents after "
                "every step"
            )
            form = "step"
        elif form == "auto":
            form = "loop"
        if form != "host" and (problem := self._problem(loop, form, stream)):
            if self.form != "auto":
                raise CaptureError(f'executor="{self.form}" cannot run here: {problem}')
            notes = [f"executor: host instead of {form}, which is slower, because {problem}"]
            form = "host"
        return form, tuple(notes)

    def _problem(self, loop: CapturedLoop, form: str, stream: int) -> str:
        """Why the device cannot switch among these buckets; announced once."""
        runtime = self._graphs.runtime
        try:
            loop.master(form, stream)
        except (runtime.SwitchUnavailable, runtime.NodeRefused) as error:
            problem = str(error).removeprefix("ddit_rt: ")
            if self.form == "auto" and problem != self._host_only:
                self._host_only = problem
                warnings.warn(
                    f"the host chooses every step's graph, which is slower: {problem}",
                    stacklevel=2,
                )
            return problem
        return ""

    def _trace(
        self, plan: RunPlan, loop: CapturedLoop, form: str, notes: tuple[str, ...], batch: int
    ) -> RunTrace:
        progress, rows = loop.control.progress(), loop.control.records()
        times = [time_ns for time_ns, _ in rows] + [loop.control.end_ns()]
        coarse = len(plan.offered) - 1
        record = torch.tensor([values for _, values in rows], dtype=torch.float32, device="cpu")
        return build_trace(
            record=record.reshape(len(rows), 3 + coarse),
            cache=None if plan.cache is None else loop.control.cache_records(),
            seconds=[(end - start) * 1e-9 for start, end in itertools.pairwise(times)],
            policy=plan.policy,
            offered=plan.offered,
            tokens=plan.tokens(),
            sigmas=plan.solver.sigmas,
            executor=f"cuda-{form}",
            solver=plan.solver.source,
            batch=batch,
            nonfinite=progress.nonfinite,
            cancelled=progress.cancelled,
            notes=(*plan.notes, *notes),
        )


class _Run:
    """One run, as the host drives and watches it."""

    def __init__(
        self,
        plan: RunPlan,
        loop: CapturedLoop,
        stream: int,
        on_step_end: StepCallback | None,
        on_progress: ProgressCallback | None,
        should_stop: Callable[[], bool] | None,
        mark: Ranges,
    ) -> None:
        self._plan = plan
        self._loop = loop
        self._control = loop.control
        self._stream = stream
        self._on_step_end = on_step_end
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._mark = mark
        self._reported = 0

    def drive(self, form: str) -> None:
        """Runs the loop and returns when the device is done.

        If anything raises here, the device is told to stop, and the buffers can be used again.
        """
        if form == "loop":
            self._loop.master("loop", self._stream).launch(self._stream)
        else:
            self._control.begin(self._stream)
        try:
            if form == "step":
                self._launch_steps()
            if form == "host":
                self._replay_steps()
        except BaseException:
            self._control.cancel()
            raise
        finally:
            if form != "loop":
                self._control.finish(self._stream)
        self._watch()

    def _launch_steps(self) -> None:
        graph = self._loop.master("step", self._stream)
        for step in range(self._plan.policy.steps):
            if self._stopped():
                return
            with self._mark(f"step/{step}"):
                graph.launch(self._stream)
            self._after(step)
            self._report(self._control.progress().decided - 1)

    def _replay_steps(self) -> None:
        control, mark = self._control, self._mark
        for step in range(self._plan.policy.steps):
            if self._stopped():
                return
            with mark(f"step/{step}"):
                with mark("decide"):
                    self._loop.measure()
                    control.decide(self._stream)
                    while control.wait(step, _POLL_SECONDS).decided <= step:
                        pass
                    branch = control.branch(step)
                reuse, bucket = divmod(branch, len(self._plan.offered))
                patch = patch_name(self._plan.offered[bucket])
                with mark(f"{'reuse' if reuse else 'model'}/{patch}"):
                    self._loop.graph(self._plan.stages[step], branch).replay()
                with mark("solver"):
                    control.update(self._stream)
            self._after(step)
            self._report(step)

    def _after(self, step: int) -> None:
        """The callback that needs latents: queued behind the step, it waits for nothing."""
        if self._on_step_end is None:
            return
        latents = self._loop.buffers.latents
        replacement = self._on_step_end(step, latents)
        if replacement is not None:
            latents.copy_(replacement, non_blocking=True)

    def _watch(self) -> None:
        """Waits for the device; meanwhile reports its progress and passes a wish to stop on."""
        try:
            seen = self._reported
            while True:
                progress = self._control.wait(seen, _POLL_SECONDS)
                seen = progress.decided
                if progress.finished:
                    break
                self._report(seen - 1)
                self._stopped()
        except BaseException:
            self._control.cancel()
            raise
        self._report(progress.decided)

    def _stopped(self) -> bool:
        stop = self._should_stop is not None and self._should_stop()
        if stop:
            self._control.cancel()
        return stop

    def _report(self, done: int) -> None:
        """Reports steps up to `done` that were not reported yet."""
        while self._reported < done:
            if self._on_progress is not None:
                self._on_progress(self._reported)
            self._reported += 1
