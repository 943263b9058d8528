"""What every executor takes and gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ddit_rt.buckets import Bucket, Signal
from ddit_rt.executor.trace import RunTrace
from ddit_rt.patch_scheduler import PolicyTable
from ddit_rt.solver import SolverTable
from ddit_rt.step_cache import CacheTable

StepCallback = Callable[[int, Tensor], Tensor | None]
"""Called after a step with its index and the new latents; may return latents to go on from.

The latents are the run's own memory, valid until the callback returns.
"""

ProgressCallback = Callable[[int], None]
"""Called with a step's index once it is done; an executor that does not wait may call it later."""


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """A run's step cache.

    Attributes:
        table: The rule.
        signal: What it goes by; None where the table says all.
        note: Which cache, with whose fit; carried into the trace.
    """

    table: CacheTable
    signal: Signal | None = None
    note: str = ""

    @property
    def rows(self) -> int:
        """Sums that are kept: one, or one for each sample and pass that the signal tells apart."""
        return 1 if self.signal is None else self.signal.rows


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything that a run needs, fixed before its first step.

    Attributes:
        buckets: Per stage bucket i of the policy table, for every i it can reach; None for the
            others.
        stages: Stage of every step: stages differ in how a step runs the model, with or without
            guidance, or with which expert, and are known before the run.
        stage_names: What sets each stage apart; empty for the usual one.
        offered: Patch sizes of the buckets, as multiples of p.
        policy: The patch policy as a table.
        solver: The solver as a table.
        patch_size: p, in latent pixels.
        capacity: Rows that the buckets' tables have, at least the number of steps.
        shared: `RunContext.tensors` of the run.
        weights: Addresses of weights that no runner watches; a graph that was captured with
            others is of no use.
        cache: The step cache; None: every step computes.
        notes: Carried into the trace.
    """

    buckets: Sequence[Sequence[Bucket | None]]
    stages: tuple[int, ...]
    stage_names: tuple[str, ...]
    offered: tuple[int, ...]
    policy: PolicyTable
    solver: SolverTable
    patch_size: int
    capacity: int
    shared: tuple[Tensor, ...] = ()
    weights: tuple[int, ...] = ()
    cache: CachePlan | None = None
    notes: tuple[str, ...] = ()

    def stage_notes(self) -> tuple[str, ...]:
        """For the trace: which steps run the model in another than the usual way."""
        runs = [
            (name, [step for step, _ in steps])
            for name, steps in itertools.groupby(
                enumerate(self.stages), key=lambda entry: self.stage_names[entry[1]]
            )
        ]
        return tuple(f"steps {steps[0]} to {steps[-1]}: {name}" for name, steps in runs if name)

    def tokens(self) -> dict[int, int]:
        """Image tokens of a step by bucket, of those that the table can reach."""
        return {i: bucket.tokens for i, bucket in enumerate(self.buckets[0]) if bucket}


class Executor(Protocol):
    """Runs the step loop. No state passes from one run to the next."""

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
        """Denoises.

        Args:
            plan: The run.
            latents: z_0, `[B, C, H, W]`, float32; left as it is.
            on_step_end: See `StepCallback`.
            on_progress: See `ProgressCallback`.
            should_stop: Asked between steps; true ends the run with the latents so far.
            annotate: Whether profilers see the ranges of `executor.ranges`.

        Returns:
            Final latents `[B, C, H, W]` float32, and the trace.
        """
        ...
