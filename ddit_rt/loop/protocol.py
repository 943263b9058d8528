"""What every executor takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ddit_rt.loop.trace import RunTrace
from ddit_rt.policies import CacheTable, PolicyTable
from ddit_rt.solver import SolverTable
from ddit_rt.steps import Bucket, Signal

ProgressCallback = Callable[[int], None]
"""Called with a step's index once it is done; an executor that does not wait may call it later."""

StepWatch = Callable[[int, int, Tensor], None]
"""Called after every step with its index k, the branch that was decided (bucket i, or behind all
buckets i again, which reused), and z_{k+1} `[B, C, H, W]`, float32, the callee's own."""


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """A run's step cache.

    Attributes:
        table: The rule that decides which steps reuse.
        signal: Measures the change that the rule compares; None where the table says all.
    """

    table: CacheTable
    signal: Signal | None = None

    @property
    def rows(self) -> int:
        """Sums that are kept: one, or one for each sample and pass that the signal tells apart."""
        return 1 if self.signal is None else self.signal.rows

    def computes(self) -> None:
        """Notes that the step in progress computes."""
        if self.signal is not None:
            self.signal.computes()

    @property
    def form(self) -> tuple[int, str, int]:
        """What a captured loop cannot take from another plan."""
        return (self.table.residual_order, type(self.signal).__name__, self.rows)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything that a run needs, fixed before its first step.

    Attributes:
        buckets: Per stage bucket i of the policy table, for every i it can reach; None for the
            others.
        stages: Stage of every step: stages differ in how a step runs the model, with or without
            guidance, or with which expert, and are known before the run.
        stage_names: What sets each stage apart; empty for the usual one.
        guided: Whether each stage is guided where the run is; empty for all.
        offered: Patch sizes of the buckets, as multiples of p.
        policy: The patch policy as a table.
        solver: The solver as a table.
        patch_size: p, in latent pixels.
        capacity: Rows that the buckets' tables have, at least the number of steps.
        shared: Tensors that all buckets read, `RunContext.tensors`.
        fixed: Plain values of the conditioning; a graph is captured for one set of them.
        weights: Addresses of weights that no runner watches; a graph is captured for one set of
            them.
        cache: The step cache; None where every step computes.
        notes: What the trace is to say of the run as a whole.
    """

    buckets: Sequence[Sequence[Bucket | None]]
    stages: tuple[int, ...]
    stage_names: tuple[str, ...]
    offered: tuple[int, ...]
    policy: PolicyTable
    solver: SolverTable
    patch_size: int
    capacity: int
    guided: tuple[bool, ...] = ()
    shared: tuple[Tensor, ...] = ()
    fixed: tuple[str, ...] = ()
    weights: tuple[int, ...] = ()
    cache: CachePlan | None = None
    notes: tuple[str, ...] = ()

    def is_guided(self, stage: int) -> bool:
        """Whether the steps of a stage are guided where the run is."""
        return not self.guided or self.guided[stage]

    def tokens(self) -> dict[int, int]:
        """Image tokens of a step by bucket, of those that the table can reach."""
        return {i: bucket.tokens for i, bucket in enumerate(self.buckets[0]) if bucket}


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptureReport:
    """What capturing one shape took.

    Attributes:
        latents: Latent shape `[B, C, H, W]`.
        text_tokens: Text tokens per sample.
        buckets: Patch sizes that are captured, in each stage.
        nodes: Number of graph nodes of each, without those that CUDA would not list.
        capture_ms: Time that warming up and capturing the buckets took.
        instantiate_ms: Time that building and instantiating the switching graphs took.
        upload_ms: Time that uploading these graphs took.
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


class StepSession(Protocol):
    """A run whose solver steps are taken elsewhere: it keeps the history, decides, runs buckets.

    For every step in turn: `decide`, then any number of `velocity`, then `end_step`. The plan's
    solver names the scheduler and its noise levels; its coefficients are not read.
    """

    def decide(self, step: int, latents: Tensor) -> int:
        """Enters z_k into the history and decides the step.

        Args:
            step: k.
            latents: z_k, `[B, C, H, W]`, of a video `[B, C, F, H, W]`, float32.

        Returns:
            The branch: bucket i, or behind all buckets i again to reuse its residual.
        """
        ...

    def bucket(self, stage: int, index: int) -> Bucket:
        """The bucket that `velocity` runs; it reads what is written into its tables before."""
        ...

    def signal(self) -> Signal | None:
        """The step cache's signal that `decide` reads, likewise; None where it reads none."""
        ...

    def velocity(self, stage: int, branch: int, latents: Tensor) -> Tensor:
        """Runs a branch of a stage in the step that was decided last.

        Args:
            stage: Index into `RunPlan.buckets`.
            branch: As `decide` gives it.
            latents: What the model is given, as in `decide`.

        Returns:
            The velocity, of the same shape; the caller's own.
        """
        ...

    def end_step(self) -> None:
        """Says that the step is over, apart from callbacks."""
        ...

    def close(self, *, cancelled: bool) -> RunTrace:
        """Ends the run, also one that failed; nothing else may be called then.

        Args:
            cancelled: Whether it ends before its last step.
        """
        ...


class Executor(Protocol):
    """Runs the step loop. No state passes from one run to the next.

    Attributes:
        form: How a run is driven, one of `FORMS`; may be set between runs. A CPU has `"auto"`.
    """

    form: str

    @property
    def captures(self) -> tuple[CaptureReport, ...]:
        """What capturing CUDA graphs took, per shape that is captured now; empty on a CPU."""
        ...

    def forget(self) -> None:
        """Drops what was captured, because the weights that it reads are elsewhere now."""
        ...

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
        """Denoises.

        Args:
            plan: The run.
            latents: z_0, `[B, C, H, W]`, float32; left as it is.
            on_progress: See `ProgressCallback`.
            should_stop: Asked between steps; true ends the run with the latents so far.
            on_step: See `StepWatch`. On CUDA the host then comes between the steps, and the run
                takes the form `step` in place of `loop`, with a note in its trace.
            annotate: Whether profilers see the ranges of `trace.ranges`.

        Returns:
            Final latents `[B, C, H, W]` float32, and the trace.
        """
        ...

    def open(
        self, plan: RunPlan, latents: Tensor, *, driver: str, annotate: bool = False
    ) -> StepSession:
        """Begins a run whose solver steps are taken elsewhere.

        Args:
            plan: The run.
            latents: z_0, as in `run`.
            driver: Who takes the steps, for the trace.
            annotate: As in `run`.
        """
        ...
