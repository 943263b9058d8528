"""The CUDA executor: one graph per bucket, and the next bucket chosen on the device.

Three forms run the same kernels and the same captured buckets, and agree to the bit:

- `loop`: one graph holds the whole loop; one launch per image.
- `step`: one graph holds a step and is launched N times back to back.
- `host`: the host reads each decision and replays that bucket's graph. For drivers that cannot
  switch, for profilers, and as the reference.

A form that CUDA refuses gives way to the next slower one: when its graph is built or uploaded, or
at the first launch of a run, when nothing has run yet.

A run whose solver steps are taken elsewhere (`open`) replays the same graphs; see `session.py`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ddit_rt import notices
from ddit_rt.errors import CaptureError, StallError
from ddit_rt.loop.capture import CapturedLoop
from ddit_rt.loop.drive import Run
from ddit_rt.loop.graphs import STALL_VARIABLE, GraphDevice
from ddit_rt.loop.protocol import CaptureReport, ProgressCallback, RunPlan, StepWatch
from ddit_rt.loop.session import CudaSession, captured_trace
from ddit_rt.loop.trace import RunTrace, ranges

FORMS = ("auto", "loop", "step", "host")  # fastest first

_KEPT = 8
"""Shapes that stay captured; the one that was not used for longest makes room."""


class CudaExecutor:
    """Runs the step loop on the device. Shapes that it has seen are captured once.

    A device that decides no further step, or does not end the last one, for as long as the
    environment variable `DDIT_RT_STALL_SECONDS` says (120; read when the device's `TorchGraphs` is
    made) has stalled: the run is given up. Set it higher if a single step takes longer.

    Attributes:
        form: `"loop"`, `"step"`, `"host"`; or `"auto"`, the fastest of them that CUDA takes. May be
            set between runs.
    """

    def __init__(self, graphs: GraphDevice, form: str = "auto") -> None:
        self.form = form
        self._graphs = graphs
        self._loops: OrderedDict[Hashable, CapturedLoop] = OrderedDict()
        self._hanging: list[CapturedLoop] = []
        self._announced: set[str] = set()

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
        on_progress: ProgressCallback | None = None,
        should_stop: Callable[[], bool] | None = None,
        on_step: StepWatch | None = None,
        annotate: bool = False,
    ) -> tuple[Tensor, RunTrace]:
        """See `Executor.run`.

        Raises:
            CaptureError: A bucket cannot be captured, or not run in the form that was asked for.
            StallError: The device went without progress for too long. If it is still busy, every
                further run raises this, too.
        """
        self._require_idle()
        mark = ranges(annotate)
        with self._graphs.on_stream() as stream, self._loaded(plan, latents) as loop:
            run = Run(plan, loop, stream, on_progress, should_stop, mark, on_step)
            form, notes = self._drive(run, loop, stream)
        return loop.buffers.latents.clone(), captured_trace(loop, plan, f"cuda-{form}", notes)

    def open(
        self, plan: RunPlan, latents: Tensor, *, driver: str, annotate: bool = False
    ) -> CudaSession:
        """See `Executor.open`.

        Raises:
            CaptureError, StallError: As in `run`; the session, too, raises these.
        """
        self._require_idle()
        with self._graphs.on_stream() as stream:
            loop = self._load(plan, latents)
            loop.control.begin(stream)
        drop = partial(self._drop, loop, hangs=True)
        return CudaSession(loop, plan, f"{driver}-cuda", ranges(annotate), drop)

    def _loop(self, plan: RunPlan, shape: torch.Size) -> CapturedLoop:
        """The captured loop of this shape, made if need be."""
        tensors = tuple((tensor.shape, tensor.dtype) for tensor in plan.shared)
        key = (
            shape,
            plan.offered,
            plan.policy.fine_share,
            plan.capacity,
            plan.solver.velocity_depth,
            plan.stage_names,
            tensors,
            plan.fixed,
            plan.weights,
            None if plan.cache is None else plan.cache.form,
        )
        if key not in self._loops:
            while len(self._loops) >= _KEPT:
                self._loops.popitem(last=False)
            self._loops[key] = CapturedLoop(self._graphs, plan, shape)
        self._loops.move_to_end(key)
        return self._loops[key]

    def _load(self, plan: RunPlan, latents: Tensor) -> CapturedLoop:
        """The loop of a plan, ready to run."""
        loop = self._loop(plan, latents.shape)
        try:
            loop.load(plan, latents)
        except BaseException as error:
            # Half a capture is of no use, and its memory may be what there was too little of.
            self._drop(loop, hangs=isinstance(error, StallError))
            raise
        return loop

    @contextmanager
    def _loaded(self, plan: RunPlan, latents: Tensor) -> Iterator[CapturedLoop]:
        """The loop of a plan, dropped afterwards where it cannot be used again."""
        loop = self._load(plan, latents)
        try:
            yield loop
        except StallError:
            self._drop(loop, hangs=True)
            raise

    def _drop(self, loop: CapturedLoop, *, hangs: bool) -> None:
        """Forgets a loop. One in which the device hangs is kept alive: its memory is in use."""
        self._loops = OrderedDict((k, v) for k, v in self._loops.items() if v is not loop)
        if hangs:
            loop.control.abandon()
            self._hanging.append(loop)

    def _require_idle(self) -> None:
        """Nothing can run behind a run that hangs. One that was only slow may be over by now."""
        if self._hanging and not self._graphs.idle():
            raise StallError(
                "the device is still busy with a run that stalled before: restart the process, or "
                f"set {STALL_VARIABLE} higher if a step takes longer"
            )
        self._hanging.clear()

    def _drive(self, run: Run, loop: CapturedLoop, stream: int) -> tuple[str, tuple[str, ...]]:
        """Runs in the fastest form that CUDA takes: which one, and why not a faster one."""
        wanted, notes = "loop" if self.form == "auto" else self.form, []
        if run.watched and wanted == "loop":
            wanted = "step"
            notes.append("executor: step instead of loop, because the latents of steps are watched")
        problems: list[str] = []
        for form in FORMS[FORMS.index(wanted) :]:
            problem = self._refusal(loop, form, stream)
            if not problem:
                self._announce(form, wanted, problems)
                problem = self._attempt(run, loop, form)
            if not problem:
                break
            if self.form != "auto":
                raise CaptureError(
                    f'executor="{self.form}" cannot run here: {problem}; executor="auto" takes '
                    "the fastest form that can"
                )
            problems.append(problem)
        if problems:
            reason = _joined(problems)
            notes.append(f"executor: {form} instead of {wanted}, which is slower, because {reason}")
        return form, tuple(notes)

    def _refusal(self, loop: CapturedLoop, form: str, stream: int) -> str:
        """Why CUDA does not take the graph of a form; tried once per loop."""
        runtime = self._graphs.runtime
        if form != "host" and form not in loop.refused:
            try:
                loop.master(form, stream)
            except (
                runtime.SwitchUnavailable,
                runtime.NodeRefused,
                runtime.GraphRefused,
            ) as error:
                loop.refuse(form, error)
        return loop.refused.get(form, "")

    def _attempt(self, run: Run, loop: CapturedLoop, form: str) -> str:
        """Runs, or says why CUDA did not launch it: nothing has run then."""
        try:
            run.drive(form)
        except self._graphs.runtime.GraphRefused as error:
            return loop.refuse(form, error)
        return ""

    def _announce(self, form: str, wanted: str, problems: list[str]) -> None:
        """Warns of a slower form, once for each reason."""
        reason = _joined(problems)
        if not problems or reason in self._announced:
            return
        self._announced.add(reason)
        notices.warn(f'executor "{form}" runs instead of "{wanted}", which is slower: {reason}')


def _joined(problems: list[str]) -> str:
    """Reasons in one text, each once: two forms may have the same one."""
    return "; ".join(dict.fromkeys(problems))
