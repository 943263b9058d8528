"""One shape, captured: fixed buffers, a graph per bucket, and the graphs that switch among them.

A captured graph reads and writes fixed addresses. So the first plan of a shape lends its buckets,
whose tensors stay; every later plan of that shape is copied into them.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddit_rt.buckets import Bucket, Signal
from ddit_rt.executor.base import RunPlan
from ddit_rt.executor.graphs import Graph, GraphDevice
from ddit_rt.patch_scheduler import patch_name

_PAST = 3
_TERMS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptureReport:
    """What capturing one shape took.

    Attributes:
        latents: Latent shape `[B, C, H, W]`.
        text_tokens: Text tokens per sample.
        buckets: Patch sizes that are captured.
        nodes: Graph nodes of each.
        capture_ms: Warm-up and capture of the buckets.
        instantiate_ms: Building and instantiating the graphs that switch.
        upload_ms: Uploading them.
        memory_bytes: Growth of the device memory that torch holds.
    """

    latents: tuple[int, ...]
    text_tokens: int
    buckets: tuple[str, ...]
    nodes: dict[str, int]
    capture_ms: float
    instantiate_ms: float
    upload_ms: float
    memory_bytes: int


class LoopBuffers:
    """Device memory of one captured loop, outside the graphs' pool.

    Attributes:
        latents: z_k, `[B, C, H, W]` float32: the buckets' input.
        velocity: v_k, likewise: the buckets' output.
        step: k, `[1]` int32: the index by which buckets read their tables.
        signal: What the step cache goes by, `[R]` float32; `[0]` without one.
    """

    def __init__(
        self, plan: RunPlan, shape: torch.Size, device: torch.device, runtime: Any
    ) -> None:
        coarse = len(plan.offered) - 1
        self._sizes = [plan.patch_size * multiple for multiple in plan.offered[1:]]
        self._shape = [shape[0], shape[1], shape[2] if len(shape) == 5 else 1, *shape[-2:]]
        self._depth = plan.solver.velocity_depth
        self._capacity = plan.capacity
        moments, keys = runtime.scratch_sizes(self._shape, self._sizes)

        def floats(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.float32, device=device)

        def integers(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.int32, device=device)

        self.latents = floats(*shape)
        self.velocity = floats(*shape)
        self._past = floats(_PAST, *shape)
        self._past_velocities = floats(self._depth - 1, *shape)
        self._coefficients = floats(plan.capacity, _TERMS)
        self._forced = integers(plan.capacity)
        self._thresholds = floats(plan.capacity, coarse)
        self._moments = floats(moments)
        self._keys = integers(keys)
        self._scores = floats(shape[0], coarse)
        self._state = integers(runtime.STATE_WORDS)
        # Sizes of 0, which have no address, stand for a loop without a step cache.
        self._cache_rows = 0 if plan.cache is None else plan.cache.rows
        self._increments = floats(0 if plan.cache is None else plan.capacity)
        self._cache = floats(self._cache_rows and runtime.CACHE_HEADER + self._cache_rows)
        self.signal = floats(self._cache_rows)
        self._settings = integers(runtime.SETTINGS_WORDS)
        self.step = self._state[:1]

    def control(self, runtime: Any, device: torch.device) -> Any:
        """A `StepControl` over these buffers, which it keeps alive."""
        tensors = {
            "latents": self.latents,
            "past": self._past,
            "velocity": self.velocity,
            "past_velocities": self._past_velocities,
            "coefficients": self._coefficients,
            "forced": self._forced,
            "thresholds": self._thresholds,
            "moments": self._moments,
            "keys": self._keys,
            "scores": self._scores,
            "state": self._state,
            "settings": self._settings,
            "increments": self._increments,
            "signal": self.signal,
            "cache": self._cache,
        }
        return runtime.StepControl(
            {name: tensor.data_ptr() for name, tensor in tensors.items()},
            shape=self._shape,
            sizes=self._sizes,
            velocity_type="float32",
            velocity_slots=self._depth,
            capacity=self._capacity,
            device=device.index or 0,
            owner=self,
            cache_rows=self._cache_rows,
        )

    def load(self, plan: RunPlan, latents: Tensor) -> None:
        """Copies a run's tables and initial latents in, without waiting for the device."""
        policy, steps = plan.policy, plan.policy.steps
        forced, thresholds = policy.tensors()
        settings = [steps, policy.order, _word(policy.quantile), policy.dwell, int(policy.monotone)]
        tables = [
            (self._coefficients, plan.solver.coefficients.to(torch.float32)),
            (self._forced, forced),
            (self._thresholds, thresholds),
        ]
        if plan.cache is not None:
            table = plan.cache.table
            terms = [_word(value) for value in table.coefficients]
            settings += [int(table.product), _word(table.threshold), table.limit, len(terms)]
            settings += terms
            tables.append((self._increments, table.tensors()[0]))
        tables.append((self._settings, torch.tensor(settings, dtype=torch.int32)))
        for target, source in tables:
            target[: len(source)].copy_(source, non_blocking=True)
        self.latents.copy_(latents, non_blocking=True)

    def previous(self, step: Tensor) -> Tensor:
        """z_{k-1} for k, `[1]`; anything at 0."""
        slot = (step + _PAST - 1) % _PAST
        return self._past.index_select(0, slot).squeeze(0)

    def next_step(self) -> Tensor:
        """The step that is decided next, `[1]`; beyond the tables, their last row."""
        return (self.step + 1).clamp(max=self._capacity - 1)


def _word(value: float) -> int:
    """The bits of a float32, as an int32."""
    (word,) = struct.unpack("<i", struct.pack("<f", value))
    assert isinstance(word, int)
    return word


class CapturedLoop:
    """The step loop of one shape on one device.

    Attributes:
        buffers: Its memory.
        control: The `StepControl`.
        report: What capturing took so far.
    """

    def __init__(self, graphs: GraphDevice, plan: RunPlan, shape: torch.Size) -> None:
        self._graphs = graphs
        self._runtime = graphs.runtime
        self._shared = plan.shared
        sizes = [patch_name(multiple) for multiple in plan.offered]
        reused = [] if plan.cache is None else [f"{size} reused" for size in sizes]
        self._names = [*sizes, *reused]
        self._sizes = len(sizes)
        self._held: dict[int, Bucket] = {}
        self._captured: dict[int, Graph] = {}
        self._signal: Graph | None = None
        self._held_signal: Signal | None = None
        self._masters: dict[str, Any] = {}
        before = graphs.memory_bytes()
        self.buffers = LoopBuffers(plan, shape, graphs.device, self._runtime)
        self.control = self.buffers.control(self._runtime, graphs.device)
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
        """Makes the captured graphs compute this run; captures the buckets that are new to it."""
        if plan.shared is not self._shared:
            for held, fresh in zip(self._shared, plan.shared, strict=True):
                held.copy_(fresh)
                # From here on both are one: a callback that changes the prompt, and a bucket that
                # is captured only now, must meet the memory that the graphs read.
                fresh.set_(held.untyped_storage(), held.storage_offset(), held.shape, held.stride())
        for index, bucket in self._held.items():
            fresh_bucket = plan.buckets[index]
            if fresh_bucket is not None:
                _copy(fresh_bucket.tensors(), bucket.tensors())
        signal = None if plan.cache is None else plan.cache.signal
        if signal is not None and self._held_signal is not None:
            _copy(signal.tensors(), self._held_signal.tensors())
        reachable = sorted(plan.policy.reachable())
        if plan.cache is not None:
            # Behind the buckets themselves: what they reuse, the buckets have to make first.
            reachable += [index + self._sizes for index in reachable]
        missing = [index for index in reachable if index not in self._captured]
        if missing or (signal is not None and self._signal is None):
            self._capture(plan, missing)
        self.buffers.load(plan, latents)

    def graph(self, branch: int) -> Graph:
        """The graph of a branch: bucket i, or behind all of them bucket i without its blocks."""
        return self._captured[branch]

    def measure(self) -> None:
        """Runs the graph that makes the step cache's signal, if there is one."""
        if self._signal is not None:
            self._signal.replay()

    def master(self, form: str, stream: int) -> Any:
        """The `StepGraph` of a form, built when it is first asked for.

        Raises:
            SwitchUnavailable, NodeRefused: Of the runtime; see `step_graph.h`.
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
            self._update_report(
                instantiate_ms=(built - started) * 1e3,
                upload_ms=(time.perf_counter() - built) * 1e3,
            )
        return self._masters[form]

    def _capture(self, plan: RunPlan, indices: Sequence[int]) -> None:
        """Captures buckets of a plan and keeps them. What they keep is as before, afterwards."""
        before, started = self._graphs.memory_bytes(), time.perf_counter()
        self.buffers.step.zero_()  # a run that was cancelled at once left -1, which is no row
        nodes = {}
        for index in indices:
            reuse, place = divmod(index, self._sizes)
            bucket = self._held.get(place) or plan.buckets[place]
            assert bucket is not None, "the policy table can reach a bucket that was not planned"
            state = (*self._shared, *bucket.tensors())
            copies = [tensor.clone() for tensor in state]
            graph = self._graphs.capture(self._names[index], self._body(bucket, bool(reuse)))
            _copy(copies, state)
            self._held[place], self._captured[index] = bucket, graph
            nodes[self._names[index]] = self._count(graph)
        signal = None if plan.cache is None else plan.cache.signal
        if signal is not None and self._signal is None:
            self._signal = self._graphs.capture("signal", self._signal_body(signal))
            self._held_signal = signal
            nodes["signal"] = self._count(self._signal)
        self._masters.clear()  # they lack the new buckets
        self._update_report(
            buckets=tuple(self._names[index] for index in sorted(self._captured)),
            nodes={**self.report.nodes, **nodes},
            capture_ms=(time.perf_counter() - started) * 1e3,
            memory_bytes=self._graphs.memory_bytes() - before,
        )

    def _count(self, graph: Graph) -> int:
        return sum(self._runtime.count_nodes(graph.raw).values())

    def _body(self, bucket: Bucket, reuse: bool) -> Callable[[], None]:
        buffers = self.buffers

        def body() -> None:
            velocity = bucket.velocity(buffers.latents, buffers.step, reuse=reuse)
            buffers.velocity.copy_(velocity)

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


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source, non_blocking=True)
