"""One run of a captured loop, as the host drives and watches it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ddit_rt.errors import CaptureError, StallError
from ddit_rt.loop.capture import CapturedLoop
from ddit_rt.loop.graphs import STALL_VARIABLE
from ddit_rt.loop.protocol import ProgressCallback, RunPlan, StepWatch
from ddit_rt.loop.trace import Ranges
from ddit_rt.policies import patch_name

_POLL_SECONDS = 0.02
"""How often the host looks up while it waits for a run."""


class Patience:
    """Waits for a device that runs a loaded plan, but not for ever."""

    def __init__(self, plan: RunPlan, loop: CapturedLoop) -> None:
        self._plan = plan
        self._loop = loop
        self._control = loop.control
        self._moved = 0.0  # when the device last did, or was given something to do

    def begin(self) -> None:
        """The device has something to do from now on."""
        self._moved = time.monotonic()

    def until(self, done: Callable[[Any], bool], form: str) -> None:
        """Waits until a progress is `done`, where the device was just given something to do.

        Raises:
            StallError: As `wait`.
        """
        self.begin()
        seen = 0
        while not done(progress := self.wait(seen, form)):
            seen = progress.decided

    def wait(self, seen: int, form: str) -> Any:
        """What the device has done, once it went beyond `seen` decisions or a moment passed.

        Raises:
            StallError: It went without progress for too long.
        """
        progress = self._control.wait(seen, _POLL_SECONDS)
        now, limit = time.monotonic(), self._loop.graphs.stall_seconds
        if progress.finished or progress.decided > seen:
            self._moved = now
        elif now - self._moved > limit:
            state = "idle" if self._loop.graphs.idle() else "busy"
            raise StallError(
                f"no progress for {now - self._moved:.3g} s, while the device is {state}: "
                f'{self._place(progress.decided)} did not end in form "{form}". If it takes more '
                f"than {limit:g} s, set {STALL_VARIABLE} higher; otherwise a kernel or the loop "
                'hangs: restart the process, with executor="host" to see which'
            )
        return progress

    def _place(self, decided: int) -> str:
        """The step that is under way."""
        if decided == 0:
            return f"the decision of step 0 of {self._plan.policy.steps}"
        patch = patch_name(self._plan.offered[self._control.bucket(decided - 1)])
        return f"step {decided - 1} of {self._plan.policy.steps} ({patch})"


class Run:
    """A run of a plan that its loop has loaded; see `Executor.run` for the callbacks.

    Attributes:
        watched: Whether the host comes between the steps, to look at the latents.
    """

    def __init__(
        self,
        plan: RunPlan,
        loop: CapturedLoop,
        stream: int,
        on_progress: ProgressCallback | None,
        should_stop: Callable[[], bool] | None,
        mark: Ranges,
        on_step: StepWatch | None = None,
    ) -> None:
        self.watched = on_step is not None
        self._on_step = on_step
        self._plan = plan
        self._loop = loop
        self._control = loop.control
        self._stream = stream
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._mark = mark
        self._reported = 0
        self._patience = Patience(plan, loop)

    def drive(self, form: str) -> None:
        """Runs the loop and returns when the device is done.

        If anything raises here, the device is told to stop. The buffers can be used again, except
        after a `StallError`.

        Raises:
            GraphRefused: Of the runtime, at the first launch: nothing has run.
            CaptureError: CUDA refused a later launch.
            StallError: The device went without progress for too long.
        """
        with self._mark("run"):
            self._launch(form)
            self._watch(form)

    def _launch(self, form: str) -> None:
        """Queues the whole run; in the host form, also follows it."""
        if form != "loop":
            self._control.begin(self._stream)
        try:
            if form == "loop":
                self._loop.master("loop", self._stream).launch(self._stream)
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

    def _launch_steps(self) -> None:
        graph = self._loop.master("step", self._stream)
        for step in range(self._plan.policy.steps):
            if self._stopped():
                return
            with self._mark(f"step/{step}"):
                self._launch_step(graph, step)
            self._see(step, "step")
            self._report(self._control.progress().decided - 1)

    def _launch_step(self, graph: Any, step: int) -> None:
        try:
            graph.launch(self._stream)
        except self._loop.graphs.runtime.GraphRefused as error:
            if step == 0:
                raise
            problem = str(error).removeprefix("ddit_rt: ")
            raise CaptureError(f"step {step} could not be launched: {problem}") from error

    def _replay_steps(self) -> None:
        control, mark = self._control, self._mark
        for step in range(self._plan.policy.steps):
            if self._stopped():
                return
            with mark(f"step/{step}"):
                with mark("decide"):
                    self._loop.measure()
                    control.decide(self._stream)
                    self._patience.until(partial(_has_decided, step), "host")
                    branch = control.branch(step)
                reuse, bucket = divmod(branch, len(self._plan.offered))
                patch = patch_name(self._plan.offered[bucket])
                with mark(f"{'reuse' if reuse else 'model'}/{patch}"):
                    self._loop.graph(self._plan.stages[step], branch).replay()
                with mark("solver"):
                    control.update(self._stream)
            self._see(step, "host")
            self._report(step)

    def _see(self, step: int, form: str) -> None:
        """Shows a queued step's latents to who watches; in stream order they are z_{k+1}."""
        if self._on_step is not None:
            self._patience.until(partial(_has_decided, step), form)
            branch = int(self._control.branch(step))
            self._on_step(step, branch, self._loop.buffers.latents.clone())

    def _watch(self, form: str) -> None:
        """Waits for the device; meanwhile reports its progress and passes a wish to stop on."""
        self._patience.begin()
        try:
            seen = self._reported
            while True:
                progress = self._patience.wait(seen, form)
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


def _has_decided(step: int, progress: Any) -> bool:
    return bool(progress.decided > step)
