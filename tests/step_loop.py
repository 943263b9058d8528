"""The step loop on buffers of its own, and the same loop by the CPU ops: for tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ddit_rt import ops
from ddit_rt.policies import CacheTable

PAST = 3
"""Latents that the loop keeps beside the newest."""

Model = Callable[[int, int, Tensor], Tensor]
"""Step, branch (a bucket, or behind all of them one that reuses) and latents to a velocity."""

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, kw_only=True)
class LoopPlan:
    """What a run's tables hold.

    Attributes:
        shape: Latent shape `[B, C, F, H, W]`.
        sizes: Edges of the coarse patches in latent pixels.
        coefficients: `[N, 6]` of the solver.
        forced: `[N]`, a bucket or -1.
        thresholds: `[N, S]`.
        dtype: Of the velocities.
        cache: The step cache.
        signals: What it goes by, `[N, R]`.
        stages: Stage of every step; empty: there is one.
    """

    shape: tuple[int, int, int, int, int]
    sizes: tuple[int, ...]
    coefficients: Tensor
    forced: Sequence[int]
    thresholds: Tensor
    dtype: torch.dtype = torch.float32
    order: int = 3
    quantile: float = 0.4
    dwell: int = 0
    monotone: bool = False
    cache: CacheTable | None = None
    signals: Tensor | None = None
    stages: Sequence[int] = ()

    @property
    def stage_count(self) -> int:
        """Stages that there are."""
        return 1 + max(self.stages, default=0)

    @property
    def steps(self) -> int:
        """Number of steps N."""
        return len(self.coefficients)

    @property
    def cache_rows(self) -> int:
        """Sums of the step cache."""
        if self.cache is None:
            return 0
        return 1 if self.signals is None else self.signals.shape[1]

    @property
    def branches(self) -> int:
        """Graphs that a step chooses among."""
        return (1 + len(self.sizes)) * (1 if self.cache is None else 2)

    @property
    def velocity_slots(self) -> int:
        """Velocities that the solver combines, D."""
        used = (self.coefficients[:, 3:] != 0).any(dim=0).nonzero()
        return 1 + int(used.max()) if len(used) else 1

    def settings(self) -> Tensor:
        """LoopSettings of loop.h, as words."""
        words = torch.zeros(16, dtype=torch.int32)
        words[:2] = torch.tensor([self.steps, self.order])
        words[2:3].view(torch.float32)[0] = self.quantile
        words[3:5] = torch.tensor([self.dwell, int(self.monotone)])
        if self.cache is not None:
            cache, terms = self.cache, len(self.cache.coefficients)
            words[5] = int(cache.growth)
            words[6:7].view(torch.float32)[0] = cache.threshold
            words[7:9] = torch.tensor([cache.limit, terms])
            words[9 : 9 + terms].view(torch.float32).copy_(torch.tensor(cache.coefficients))
        return words


def euler(steps: int, dt: float = -0.1) -> Tensor:
    """Coefficients of Euler's method."""
    return torch.tensor([[1.0, 0, 0, dt, 0, 0]] * steps)


def multistep(steps: int, slots: int) -> Tensor:
    """Random coefficients of a stable multistep method; early steps use what exists by then."""
    rows = torch.zeros(steps, 6)
    rows[:, :3] = torch.tensor([0.7, 0.2, 0.1])
    rows[:, 3 : 3 + slots] = 0.3 * torch.randn(steps, slots)
    for step in range(min(2, steps)):
        rows[step, step + 1 : 3] = 0.0
        rows[step, 4 + step :] = 0.0
    return rows


def plan_of(
    shape: tuple[int, int, int, int, int] = (1, 2, 1, 8, 8),
    sizes: tuple[int, ...] = (4,),
    coefficients: Tensor | None = None,
    **changes: Any,
) -> LoopPlan:
    """Three forced steps, then dynamic ones; by default three of Euler's method."""
    coefficients = euler(3) if coefficients is None else coefficients
    steps = len(coefficients)
    fields = {
        "forced": [0] * min(3, steps) + [-1] * (steps - 3),
        "thresholds": torch.full((steps, len(sizes)), 0.1),
    }
    return LoopPlan(shape=shape, sizes=sizes, coefficients=coefficients, **{**fields, **changes})


class StepLoop:
    """Buffers and a `StepControl` of a runtime.

    Memory that a run has to write before it reads it is full of NaN.
    """

    def __init__(
        self,
        runtime: ModuleType,
        plan: LoopPlan,
        *,
        capacity: int | None = None,
        device: torch.device | str = "cpu",
        index: int = 0,
        buffers: dict[str, Tensor] | None = None,
        patience: float = 60.0,
    ) -> None:
        self.runtime = runtime
        self._patience_s = 0.0 if str(device) == "cpu" else 60.0  # emulated launches return done
        capacity = plan.steps if capacity is None else capacity
        self.buffers = make_buffers(runtime, plan, capacity, device) | (buffers or {})
        self.control: Any = runtime.StepControl(
            addresses(self.buffers),
            shape=list(plan.shape),
            sizes=list(plan.sizes),
            velocity_type=DTYPES[plan.dtype],
            velocity_slots=plan.velocity_slots,
            capacity=capacity,
            device=index,
            owner=self.buffers,
            cache_rows=plan.cache_rows,
            stages=plan.stage_count,
            patience=patience,
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.buffers[name]

    def load(self, plan: LoopPlan, start: Tensor) -> None:
        """Writes a run's tables and initial latents."""
        for name, values in (
            ("coefficients", plan.coefficients),
            ("forced", torch.tensor(plan.forced, dtype=torch.int32)),
            ("thresholds", plan.thresholds),
        ):
            self[name][: plan.steps].copy_(values)
        if plan.cache is not None:
            self["increments"][: plan.steps].copy_(plan.cache.tensors()[0])
        if plan.stages:
            self["stages"][: plan.steps].copy_(torch.tensor(plan.stages))
        self["settings"].copy_(plan.settings())
        self["latents"].copy_(start)

    def run_host(self, steps: int, bucket: Callable[[int], None], stream: int = 0) -> None:
        """The host-polled form: `bucket(index)` runs a bucket on the device."""
        self.control.begin(stream)
        for step in range(steps):
            self.control.decide(stream)
            if self.control.wait(step, self._patience_s).decided <= step:
                break
            bucket(self.control.branch(step))
            self.control.update(stream)
        self.control.finish(stream)

    def record(self) -> Tensor:
        """Rows of the trace, `[N, 3 + S]`."""
        return torch.tensor([values for _, values in self.control.records()])

    def bits(self) -> dict[str, Tensor]:
        """Everything that a run has computed, as integers: equal means equal to the bit."""
        names = ("latents", "past", "past_velocities", "moments", "scores")
        bits = {name: self[name].cpu().view(torch.int32).clone() for name in names}
        record = self.record()
        cache = torch.tensor(self.control.cache_records(), dtype=torch.float32)
        for rows in (record, cache):
            rows[rows.isnan()] = math.nan  # a NaN's own bits differ between devices
        return bits | {"record": record.view(torch.int32), "cache": cache.view(torch.int32)}


def make_buffers(
    runtime: ModuleType, plan: LoopPlan, capacity: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The device memory of one loop."""
    moments, keys = runtime.scratch_sizes(list(plan.shape), list(plan.sizes))
    batch, coarse = plan.shape[0], len(plan.sizes)

    def unset(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype, device=device)

    def integers(size: int, value: int = 0) -> Tensor:
        return torch.full((size,), value, dtype=torch.int32, device=device)

    return {
        "latents": unset(*plan.shape),
        "past": unset(PAST, *plan.shape),
        "velocity": unset(*plan.shape, dtype=plan.dtype),
        "past_velocities": unset(plan.velocity_slots - 1, *plan.shape),
        "coefficients": unset(capacity, 6),
        "forced": integers(capacity, -7),
        "thresholds": unset(capacity, coarse),
        "moments": unset(moments),
        "keys": integers(keys, -1),
        "scores": unset(batch, coarse),
        "state": integers(runtime.STATE_WORDS),
        "settings": integers(runtime.SETTINGS_WORDS),
        "increments": unset(0 if plan.cache is None else capacity),
        "signal": unset(plan.cache_rows),
        "cache": unset(plan.cache_rows and runtime.CACHE_HEADER + plan.cache_rows),
        "stages": integers(capacity if plan.stages else 0),
    }


def addresses(buffers: dict[str, Tensor]) -> dict[str, int]:
    """As `StepControl` takes them."""
    return {name: tensor.data_ptr() for name, tensor in buffers.items()}


@dataclass(frozen=True, kw_only=True)
class CpuRun:
    """A run by the CPU ops: z_0 to z_N, v_0 to v_{N-1}, and the trace.

    Attributes:
        record: `[N, 3 + S]`.
        cache_record: `[N, 2]`.
        branches: Of every step.
    """

    latents: list[Tensor]
    velocities: list[Tensor]
    record: Tensor
    cache_record: Tensor
    branches: list[int]
    nonfinite: bool

    @property
    def buckets(self) -> list[int]:
        """The bucket of every step."""
        return [int(bucket) for bucket in self.record[:, 0]]


def run_cpu(plan: LoopPlan, start: Tensor, model: Model) -> CpuRun:
    """The step loop by the ops that `ddit_rt.loop.cpu` calls."""
    history = torch.zeros(4, *plan.shape)
    history[0] = start
    ring = torch.zeros(plan.velocity_slots - 1, *plan.shape)
    state = torch.tensor([-1, 0, 0, 0], dtype=torch.int32)
    record = torch.zeros(plan.steps, 3 + len(plan.sizes))
    forced = torch.tensor(plan.forced, dtype=torch.int32)
    memory, cache_record = torch.zeros(2 + max(plan.cache_rows, 1)), torch.zeros(plan.steps, 2)
    latents, velocities, branches = [start.clone()], [], []
    for k in range(plan.steps):
        scores = torch.full((plan.shape[0], len(plan.sizes)), math.nan)
        if plan.forced[k] == -1:
            scores = ops.patch_scores(history, plan.sizes, plan.quantile, plan.order, -k % 4)
        ops.decide_(scores, forced, plan.thresholds, state, record, k, plan.dwell, plan.monotone)
        if plan.cache is not None:
            increments, coefficients = plan.cache.tensors()
            signal = torch.zeros(0) if plan.signals is None else plan.signals[k]
            ops.decide_reuse_(
                signal, increments, coefficients, state, memory, cache_record, k,
                1 + len(plan.sizes), plan.cache.threshold, plan.cache.limit, plan.cache.growth,
            )  # fmt: skip
        branches.append(int(state[3]))
        velocity = model(k, branches[-1], history[-k % 4]).to(plan.dtype)
        ops.solver_step_(history, ring, velocity, plan.coefficients, k)
        velocities.append(velocity)
        latents.append(history[-(k + 1) % 4].clone())
    return CpuRun(
        latents=latents,
        velocities=velocities,
        record=record,
        cache_record=cache_record,
        branches=branches,
        nonfinite=bool(state[2]),
    )


class RandomModel:
    """A model whose velocities are now rough, now smooth, and differ between buckets.

    v = table[bucket, step] + z / 8: one rounding, so that every device has the same bits.

    Attributes:
        table: `[branches, N, B, C, F, H, W]`.
    """

    def __init__(self, plan: LoopPlan) -> None:
        noise = torch.randn(plan.steps, *plan.shape)
        noise *= 10.0 ** torch.randint(-3, 1, (plan.steps, 1, 1, 1, 1, 1))
        self.table = torch.stack([(1.0 + 0.25 * i) * noise for i in range(plan.branches)])
        self._dtype = plan.dtype

    def __call__(self, step: int, bucket: int, latents: Tensor) -> Tensor:
        return (self.table[bucket, step] + latents / 8).to(self._dtype)


@dataclass(frozen=True, kw_only=True)
class MixedRun:
    """A plan whose scores choose more than one bucket, its model, and the CPU's run of it."""

    plan: LoopPlan
    model: RandomModel
    cpu: CpuRun


def mixed_run(
    shape: tuple[int, int, int, int, int] = (2, 3, 1, 16, 16), steps: int = 7, **changes: Any
) -> MixedRun:
    """Three forced steps, then dynamic ones, with a multistep solver; `changes` to the plan."""
    plan = plan_of(shape, **{"sizes": (4, 8), "coefficients": multistep(steps, 2), **changes})
    start, model = torch.randn(shape), RandomModel(plan)
    if plan.sizes:  # thresholds that half of the scores are below
        never = replace(plan, thresholds=torch.full_like(plan.thresholds, math.nan))
        scores = run_cpu(never, start, model).record[:, 3:]
        middle = scores.nanmedian(dim=0).values * (1 + 1e-3)  # so that none is at its threshold
        plan = replace(plan, thresholds=middle.expand_as(plan.thresholds).contiguous())
    run = run_cpu(plan, start, model)
    assert len(set(run.buckets)) > 1 or not plan.sizes
    return MixedRun(plan=plan, model=model, cpu=run)


def run_form(
    loop: StepLoop,
    form: str,
    buckets: Any,
    steps: int,
    stream: int = 0,
    *,
    graphs: Sequence[tuple[str, int]] | None = None,
    signal: int = 0,
) -> None:
    """Runs a loaded loop in a form: `"loop"`, `"step"`, or `"host"`, which replays buckets."""
    if form == "host":
        loop.run_host(steps, buckets.replay, stream)
        return
    graphs = graphs or buckets.graphs
    master = loop.runtime.StepGraph(
        loop.control, graphs, form, owner=(loop.buffers, graphs), signal=signal
    )
    launch(master, loop.control, form, steps, stream)


def launch(graph: Any, control: Any, form: str, steps: int, stream: int = 0) -> None:
    """Queues a whole run on a graph of this form: by one launch, or by one a step."""
    if form == "loop":
        graph.launch(stream)
        return
    control.begin(stream)
    for _ in range(steps):
        graph.launch(stream)
    control.finish(stream)


class EmulatedBuckets:
    """Graphs of the emulated runtime that compute a model's buckets on a loop's buffers.

    Attributes:
        log: (step, bucket) of every call.
        graphs: Names and addresses, as `StepGraph` takes them.
    """

    def __init__(self, loop: StepLoop, model: Model, buckets: int) -> None:
        self._buffers = loop.buffers
        self._model = model
        self.log: list[tuple[int, int]] = []
        self.graphs = [
            (f"{2**index}p", loop.runtime.call_graph(partial(self.replay, index)))
            for index in range(buckets)
        ]

    def replay(self, index: int) -> None:
        """What the bucket's graph does."""
        step = int(self._buffers["state"][0])
        self.log.append((step, index))
        self._buffers["velocity"].copy_(self._model(step, index, self._buffers["latents"]))


def emulated_run(
    runtime: ModuleType, run: MixedRun | None = None, **options: Any
) -> tuple[MixedRun, StepLoop, EmulatedBuckets]:
    """A run, by default `mixed_run()`, and a loop and buckets of the emulated runtime for it."""
    run = run or mixed_run()
    loop = StepLoop(runtime, run.plan, **options)
    loop.load(run.plan, run.cpu.latents[0])
    return run, loop, EmulatedBuckets(loop, run.model, run.plan.branches)
