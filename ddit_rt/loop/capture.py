"""One shape, captured: a graph per bucket of a stage, and the graphs that switch among them.

A captured graph reads and writes fixed addresses. So the first plan of a shape lends its buckets,
whose tensors stay; every later plan of that shape is copied into them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ddit_rt.errors import CaptureError
from ddit_rt.loop.buffers import LoopBuffers
from ddit_rt.loop.graphs import Graph, GraphDevice
from ddit_rt.loop.protocol import CaptureReport, RunPlan
from ddit_rt.policies import patch_name
from ddit_rt.steps import Bucket, Signal

LOG = logging.getLogger("ddit_rt.loop")


class CapturedLoop:
    """The step loop of one shape on one device.

    Attributes:
        buffers: The loop's memory.
        control: The `StepControl`.
        graphs: The device that it runs on.
        report: What capturing took so far.
        refused: Forms that cannot run this loop, and why. A form stays here when buckets are added
            to the loop: its graph would hold all that it was refused with.
    """

    def __init__(self, graphs: GraphDevice, plan: RunPlan, shape: torch.Size) -> None:
        self.graphs = graphs
        self._runtime = graphs.runtime
        self._shared = plan.shared
        sizes = [patch_name(multiple) for multiple in plan.offered]
        reused = [] if plan.cache is None else [f"{size} reused" for size in sizes]
        self._names = [
            f"{name} {stage}".rstrip() for stage in plan.stage_names for name in (*sizes, *reused)
        ]
        self._sizes = len(sizes)
        self._stage_branches = len(sizes) + len(reused)
        self._held: dict[tuple[int, int], Bucket] = {}
        self._captured: dict[int, Graph] = {}
        self._signal: Graph | None = None
        self._held_signal: Signal | None = None
        self._masters: dict[str, Any] = {}
        self.refused: dict[str, str] = {}
        before = graphs.memory_bytes()
        with _want_of_memory("the step loop's buffers", shape):
            self.buffers = LoopBuffers(plan, shape, graphs.device, self._runtime)
            self.control = self.buffers.control(self._runtime, graphs.device, graphs.stall_seconds)
        self.report = CaptureReport(
            latents=tuple(shape),
            text_tokens=int(plan.shared[0].shape[1]) if plan.shared else 0,
            buckets=(),
            nodes={},
            capture_ms=0.0,
            instantiate_ms=0.0,
            upload_ms=0.0,
            memory_bytes=graphs.memory_bytes() - before,
        )

    def load(self, plan: RunPlan, latents: Tensor) -> None:
        """Makes the captured graphs compute this run; captures the buckets that are new to it.

        After an error the loop is of no use.

        Raises:
            CaptureError: A bucket cannot be captured, or there is not enough memory for it.
            StallError: A bucket does not end.
        """
        if plan.shared is not self._shared:
            for held, fresh in zip(self._shared, plan.shared, strict=True):
                held.copy_(fresh)
                # From here on both are one: what is written between two steps, and a bucket that is
                # captured only now, must meet the memory that the graphs read.
                fresh.set_(held.untyped_storage(), held.storage_offset(), held.shape, held.stride())
        sources: dict[Tensor, Tensor] = {}  # by target, since several share some
        for (stage, index), bucket in self._held.items():
            fresh_bucket = plan.buckets[stage][index]
            if fresh_bucket is not None:
                sources.update(zip(bucket.tensors(), fresh_bucket.tensors(), strict=True))
        signal = None if plan.cache is None else plan.cache.signal
        if signal is not None and self._held_signal is not None:
            sources.update(zip(self._held_signal.tensors(), signal.tensors(), strict=True))
        _copy(sources.values(), sources.keys())
        reachable = sorted(plan.policy.reachable())
        if plan.cache is not None:
            # Behind the buckets themselves: what they reuse, the buckets have to make first.
            reachable += [index + self._sizes for index in reachable]
        starts = range(0, len(self._names), self._stage_branches)
        branches = [start + index for start in starts for index in reachable]
        missing = [branch for branch in branches if branch not in self._captured]
        if missing or (signal is not None and self._signal is None):
            self._capture(plan, missing)
        self.buffers.load(plan, latents)

    def graph(self, stage: int, branch: int) -> Graph:
        """A stage's graph of a branch: bucket i, or behind them bucket i without its blocks."""
        return self._captured[stage * self._stage_branches + branch]

    def bucket(self, stage: int, index: int) -> Bucket:
        """The bucket whose graphs a stage replays."""
        return self._held[stage, index]

    @property
    def signal(self) -> Signal | None:
        """What the graph of the step cache's signal reads; None without one."""
        return self._held_signal

    def measure(self) -> None:
        """Runs the graph that makes the step cache's signal, if there is one."""
        if self._signal is not None:
            self._signal.replay()

    def master(self, form: str, stream: int) -> Any:
        """The `StepGraph` of a form, built when it is first asked for.

        Raises:
            SwitchUnavailable, NodeRefused, GraphRefused: Of the runtime; see `step_graph.h`.
        """
        if form not in self._masters:
            buckets = [
                (name, self._captured[index].raw if index in self._captured else 0)
                for index, name in enumerate(self._names)
            ]
            started = time.perf_counter()
            graph = self._runtime.StepGraph(
                self.control,
                buckets,
                form,
                owner=[*self._captured.values(), self._signal],
                signal=0 if self._signal is None else self._signal.raw,
            )
            built = time.perf_counter()
            graph.upload(stream)
            self._masters[form] = graph
            took = ((built - started) * 1e3, (time.perf_counter() - built) * 1e3)
            self._update_report(instantiate_ms=took[0], upload_ms=took[1])
            LOG.info("built the graph of form %s in %.1f ms, uploaded in %.1f ms", form, *took)
        return self._masters[form]

    def refuse(self, form: str, error: Exception) -> str:
        """Notes that a form cannot run this loop, drops its graph, and says why."""
        self._masters.pop(form, None)
        self.refused[form] = str(error).removeprefix("ddit_rt: ")
        LOG.info("form %s cannot run this loop: %s", form, self.refused[form])
        return self.refused[form]

    def _capture(self, plan: RunPlan, indices: Sequence[int]) -> None:
        """Captures buckets of a plan and keeps them. What they keep is as before, afterwards."""
        before, started = self.graphs.memory_bytes(), time.perf_counter()
        self.buffers.step.zero_()  # a run that was cancelled at once left -1, which is no row
        nodes = {}
        for index in indices:
            stage, branch = divmod(index, self._stage_branches)
            reuse, size = divmod(branch, self._sizes)
            bucket = self._held.get((stage, size)) or plan.buckets[stage][size]
            assert bucket is not None, "the policy table can reach a bucket that was not planned"
            state = (*self._shared, *bucket.tensors())
            with _want_of_memory(self._names[index], self.buffers.latents.shape):
                copies = [tensor.clone() for tensor in state]
                body = self._body(plan, bucket, reuse=bool(reuse), guided=plan.is_guided(stage))
                graph = self.graphs.capture(self._names[index], body)
            _copy(copies, state)
            self._held[stage, size], self._captured[index] = bucket, graph
            nodes.update(self._count(self._names[index], graph))
        signal = None if plan.cache is None else plan.cache.signal
        if signal is not None and self._signal is None:
            with _want_of_memory("signal", self.buffers.latents.shape):
                self._signal = self.graphs.capture("signal", self._signal_body(signal))
            self._held_signal = signal
            nodes.update(self._count("signal", self._signal))
        self._masters.clear()  # they lack the new buckets
        milliseconds = (time.perf_counter() - started) * 1e3
        grown = self.graphs.memory_bytes() - before
        self._update_report(
            buckets=tuple(self._names[index] for index in sorted(self._captured)),
            nodes={**self.report.nodes, **nodes},
            capture_ms=milliseconds,
            memory_bytes=grown,
        )
        LOG.info(
            "captured %s for latents of %s in %.1f ms; %.1f MiB more",
            *(", ".join(nodes), list(self.buffers.latents.shape), milliseconds, grown / 2**20),
        )

    def _count(self, name: str, graph: Graph) -> dict[str, int]:
        """Nodes of a graph by its name; the report is nothing that a run has to fail for."""
        try:
            return {name: sum(self._runtime.count_nodes(graph.raw).values())}
        except RuntimeError:
            return {}

    def _body(
        self, plan: RunPlan, bucket: Bucket, *, reuse: bool, guided: bool
    ) -> Callable[[], None]:
        buffers = self.buffers

        def body() -> None:
            velocity = bucket.velocity(buffers.latents, buffers.step, reuse=reuse, guided=guided)
            buffers.velocity.copy_(velocity)
            if plan.cache is not None and not reuse:
                plan.cache.computes()

        return body

    def _signal_body(self, signal: Signal) -> Callable[[], None]:
        buffers = self.buffers

        def body() -> None:
            # It comes before the decision, which makes the next step the one in progress.
            step = buffers.next_step()
            buffers.signal.copy_(signal.change(buffers.latents, buffers.previous(step), step))

        return body

    def _update_report(self, **changes: Any) -> None:
        """Replaces fields; times and bytes add up."""
        report = self.report
        fields = {name: getattr(report, name) for name in CaptureReport.__slots__}
        for name, value in changes.items():
            adds = name.endswith(("_ms", "_bytes"))
            fields[name] = fields[name] + value if adds else value
        self.report = CaptureReport(**fields)


@contextmanager
def _want_of_memory(what: str, shape: torch.Size) -> Iterator[None]:
    """Says what there was no memory for, and at which shape."""
    try:
        yield
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        latents = " x ".join(map(str, shape))
        raise CaptureError(
            f"out of memory while capturing {what} for latents of {latents}: run a smaller batch, "
            f"image or video, or free memory of the device ({error})"
        ) from error


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it followed from, is for want of memory.

    Torch ends a capture that ran out of memory with an error of its own.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _copy(sources: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source, non_blocking=True)
