"""Runs whose velocities are fixed, and a tiny model, for tests of the CUDA executor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from models import noise, tiny_conditioning, tiny_transformer
from torch import Tensor

import ddit_rt
from ddit_rt.loop import RunPlan
from ddit_rt.models.flux import FluxFamily
from ddit_rt.planning.compiled import CompiledModel
from ddit_rt.planning.outline import Outline, outline_run
from ddit_rt.planning.plan import plan_run
from ddit_rt.planning.request import Request
from ddit_rt.policies import DDiTPolicy, PatchPolicy, Schedule
from ddit_rt.solver import SolverTable, probe_scheduler
from ddit_rt.steps import at_step

SHAPE = (1, 4, 16, 16)
FORMS = ["loop", "step", "host"]
MIXED = DDiTPolicy(tau=1.0, refresh=2, fine_tail=1)


class ScriptedBucket:
    """Velocities fixed beforehand."""

    def __init__(self, multiple: int, velocities: Tensor) -> None:
        self.multiple = multiple
        self.tokens = 64 // multiple**2
        self._velocities = velocities

    def velocity(
        self, latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = True
    ) -> Tensor:
        return at_step(self._velocities, step) / (self.multiple + 0.5 * reuse)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self._velocities,)


def euler(steps: int) -> SolverTable:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return probe_scheduler(scheduler)


def unipc(steps: int) -> SolverTable:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(steps)
    return probe_scheduler(scheduler)


def scripted_plan(
    policy: PatchPolicy,
    solver: SolverTable,
    *,
    seed: int = 0,
    shape: tuple[int, ...] = SHAPE,
    offered: tuple[int, ...] = (1, 2, 4),
    capacity: int = 16,
    stages: Sequence[int] = (),
) -> RunPlan:
    """Buckets that decay, so that scores cross thresholds; those of a later stage are smaller."""
    decay = torch.tensor([0.5**step for step in range(capacity)])
    table = policy.resolve(Schedule(sigmas=solver.sigmas, offered=offered))
    velocities = noise(capacity, *shape, seed=seed) * decay.reshape(-1, *[1] * len(shape))
    return RunPlan(
        buckets=[
            [ScriptedBucket(multiple, velocities / (1 + stage)) for multiple in offered]
            for stage in range(1 + max(stages, default=0))
        ],
        stages=tuple(stages) or (0,) * table.steps,
        stage_names=("", "second", "third")[: 1 + max(stages, default=0)],
        offered=offered,
        policy=table,
        solver=solver,
        patch_size=2,
        capacity=capacity,
    )


def assert_same_run(
    actual: tuple[Tensor, Any], expected: tuple[Tensor, Any], *, scores: bool = True
) -> None:
    """Equal latents to the bit; equal traces but for times and names."""
    assert torch.equal(actual[0], expected[0])
    assert len(actual[1]) == len(expected[1])
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        assert replace(ours, latency_ms=0.0, scores={}) == replace(
            theirs, latency_ms=0.0, scores={}
        )
        if scores:
            # The two merge moments in another order: a few units in the last place.
            assert ours.scores == pytest.approx(theirs.scores, rel=5e-6, nan_ok=True)


class TinyModel:
    """A real model with eager blocks, planned anew for every run."""

    def __init__(self) -> None:
        self.transformer = tiny_transformer()
        engine = ddit_rt.compile(self.transformer, backend="eager", progress=False)
        self.compiled: CompiledModel = engine._compiled

    def outline(
        self, policy: PatchPolicy, *, steps: int = 10, solver: SolverTable | None = None
    ) -> Outline:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(steps)
        return outline_run(
            self.compiled,
            Request(policy=policy),
            shape=SHAPE,
            timesteps=FluxFamily().linear_timesteps(scheduler),
            solver=solver or probe_scheduler(scheduler),
        )

    def plan(self, policy: PatchPolicy, *, seed: int = 1, steps: int = 10) -> RunPlan:
        conditioning = tiny_conditioning(self.transformer, seed=seed)
        return plan_run(self.compiled, self.outline(policy, steps=steps), conditioning)
