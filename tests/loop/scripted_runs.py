"""Runs whose velocities are fixed, and a tiny model, for tests of the CUDA executor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from models import eager, noise, tiny_conditioning, tiny_transformer
from torch import Tensor
from wan_models import wan_conditioning, wan_transformer

from ddit_rt.loop import RunPlan
from ddit_rt.planning.compiled import CompiledModel
from ddit_rt.planning.outline import Outline, outline_run
from ddit_rt.planning.plan import plan_run
from ddit_rt.planning.request import Request
from ddit_rt.policies import DDiTPolicy, NoCache, PatchPolicy, Schedule, StaticPolicy, StepCache
from ddit_rt.solver import SolverTable, probe_scheduler
from ddit_rt.steps import at_step

SHAPE = (1, 4, 16, 16)
FORMS = ["loop", "step", "host"]
MIXED = DDiTPolicy(tau=1.0, refresh=2, fine_tail=1)
POLICIES = [
    DDiTPolicy(tau=0.05, refresh=None, fine_tail=1),
    DDiTPolicy(tau=0.02, order=2, rho=1.0, dwell=2, monotone=True, warmup="coarse", refresh=None),
    StaticPolicy("4p:0.3,2p:0.3,p"),
]


class ScriptedBucket:
    """Velocities fixed beforehand.

    Attributes:
        before: Called with every step that asks for one.
    """

    before: Callable[[int], object] | None = None

    def __init__(self, multiple: int, velocities: Tensor) -> None:
        self.multiple = multiple
        self.tokens = 64 // multiple**2
        self._velocities = velocities

    def velocity(
        self, latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = True
    ) -> Tensor:
        if self.before is not None:
            self.before(int(step))
        return at_step(self._velocities, step)

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
    stages: Sequence[int] = (),
    velocities: Tensor | None = None,
) -> RunPlan:
    """A plan whose buckets say `velocities / multiple`, in a later stage less.

    By default they decay, so that scores cross thresholds.
    """
    if velocities is None:
        decay = torch.tensor([0.5**step for step in range(16)])
        velocities = noise(16, *shape, seed=seed) * decay.reshape(-1, *[1] * len(shape))
    table = policy.resolve(Schedule(sigmas=solver.sigmas, offered=offered))
    return RunPlan(
        buckets=[
            [
                ScriptedBucket(multiple, velocities / (multiple * (1 + stage)))
                for multiple in offered
            ]
            for stage in range(1 + max(stages, default=0))
        ],
        stages=tuple(stages) or (0,) * table.steps,
        stage_names=("", "second", "third")[: 1 + max(stages, default=0)],
        offered=offered,
        policy=table,
        solver=solver,
        patch_size=2,
        capacity=len(velocities),
    )


def first_bucket(plan: RunPlan) -> ScriptedBucket:
    """Of a scripted plan: p."""
    bucket = plan.buckets[0][0]
    assert isinstance(bucket, ScriptedBucket)
    return bucket


def assert_same_run(actual: tuple[Tensor, Any], expected: tuple[Tensor, Any]) -> None:
    """Equal latents to the bit; equal traces but for times and names."""
    assert torch.equal(actual[0], expected[0])
    assert len(actual[1]) == len(expected[1])
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        assert replace(ours, latency_ms=0.0, scores={}) == replace(
            theirs, latency_ms=0.0, scores={}
        )
        # The two merge moments in another order: a few units in the last place.
        assert ours.scores == pytest.approx(theirs.scores, rel=5e-6, nan_ok=True)


class TinyModel:
    """A real model of a family with eager blocks, planned anew for every run; Wan's is guided."""

    def __init__(self, name: str = "flux", shape: tuple[int, ...] = SHAPE) -> None:
        self.transformer = tiny_transformer() if name == "flux" else wan_transformer()
        self.compiled: CompiledModel = eager(self.transformer)._compiled
        self.shape = shape
        self.guided = name == "wan"

    def conditioning(self, seed: int = 1) -> dict[str, Tensor]:
        if self.guided:
            return wan_conditioning(guidance_scale=4.0)
        return tiny_conditioning(self.transformer, self.shape[0], seed=seed)

    def outline(
        self,
        policy: PatchPolicy,
        cache: StepCache | None = None,
        *,
        steps: int = 10,
        solver: SolverTable | None = None,
        **request: Any,
    ) -> Outline:
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(steps)
        return outline_run(
            self.compiled,
            Request(policy=policy, step_cache=cache or NoCache(), **request),
            shape=self.shape,
            timesteps=self.compiled.steps.family.linear_timesteps(scheduler),
            solver=solver or probe_scheduler(scheduler),
            guided=self.guided,
        )

    def plan(
        self, policy: PatchPolicy, cache: StepCache | None = None, *, seed: int = 1, **request: Any
    ) -> RunPlan:
        outline = self.outline(policy, cache, **request)
        return plan_run(self.compiled, outline, self.conditioning(seed))
