"""A request to an engine: its checks, and the plan of its run by the engine's own defaults."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ddit_rt.artifact import Artifact
from ddit_rt.buckets import StepModel
from ddit_rt.errors import ArtifactMismatchError, ShapeError
from ddit_rt.executor import RunPlan
from ddit_rt.patch_scheduler import DDiTPolicy, FinePolicy, PatchPolicy, policy_from_dict
from ddit_rt.pipeline.planning import CompiledModel, plan_run
from ddit_rt.pipeline.presets import PolicyChoice, ResolvedPolicy, resolve_choice
from ddit_rt.pipeline.prompt import RunPrompt
from ddit_rt.solver import SolverTable, probe_scheduler
from ddit_rt.step_cache import NoCache, StepCache, step_cache_from_dict

_SCHEDULES = 64
"""Probed schedules that a planner keeps; a server repeats few."""


class Planner:
    """Plans the runs of one engine.

    Attributes:
        artifact: What was compiled, with the defaults, calibrations and fits of its manifest.
    """

    def __init__(self, compiled: CompiledModel, artifact: Artifact) -> None:
        self._compiled = compiled
        self.artifact = artifact
        self._device = compiled.steps.device
        self._solvers: dict[tuple[Any, ...], SolverTable] = {}
        self._announced: set[str] = set()

    @property
    def default_policy(self) -> PatchPolicy:
        """The artifact's own, else `DDiTPolicy()`."""
        stored = self.artifact.manifest.policy
        return policy_from_dict(stored) if stored else DDiTPolicy()

    @property
    def default_step_cache(self) -> StepCache:
        """The artifact's own, else `NoCache()`."""
        stored = self.artifact.manifest.step_cache
        return step_cache_from_dict(stored) if stored else NoCache()

    def choose(
        self,
        policy: PolicyChoice | None,
        requested: Callable[[], tuple[int, bool]],
        arguments: Mapping[str, Any],
    ) -> ResolvedPolicy:
        """The policy of a run, and its steps; arguments as `resolve_choice` takes them."""
        if policy is None:
            policy = self.default_policy
        choice = resolve_choice(policy, self.artifact.manifest, requested, arguments)
        # Behind `choose`, the engine's call and its no_grad: the caller.
        self._announce(choice.warnings, stacklevel=5)
        return choice

    def check_model(self) -> None:
        """Refuses models that have changed device, or are not what the engine was made for."""
        for model in self._compiled.models:
            if model.device != self._device:
                raise ArtifactMismatchError(
                    f"the model was on {self._device} when this engine was made and is on "
                    f"{model.device} now; move it back, or compile or load again"
                )
        if self._compiled.live is not None:
            self._compiled.live.check()

    def plan(
        self,
        shape: tuple[int, ...],
        conditioning: dict[str, Tensor],
        scheduler: Any,
        choice: ResolvedPolicy,
        *,
        batched_guidance: bool,
        guidance_interval: tuple[float, float],
        step_cache: StepCache | None,
        experts: Sequence[int],
    ) -> tuple[RunPlan, RunPrompt]:
        """Fixes a run: `plan_run` with the scheduler's table, the defaults and the fits.

        Args:
            shape: As in `plan_run`.
            conditioning: As in `plan_run`.
            scheduler: The run's, its timesteps set.
            choice: What `choose` gave.
            batched_guidance: As in `plan_run`.
            guidance_interval: As in `plan_run`.
            step_cache: The caller's; None for that of a calibrated plan, else the default.
            experts: As in `plan_run`.
        """
        plan, prompt = plan_run(
            self._compiled,
            shape=shape,
            conditioning=conditioning,
            timesteps=self._compiled.steps.family.linear_timesteps(scheduler),
            solver=self._solver(scheduler),
            policy=choice.policy,
            batched_guidance=batched_guidance,
            guidance_interval=guidance_interval,
            step_cache=step_cache or choice.step_cache or self.default_step_cache,
            fits=self.artifact.manifest.cache_fits,
            experts=experts,
        )
        if not isinstance(choice.policy, FinePolicy):
            # Behind `plan`, `Engine._plan`, the engine's call and its no_grad: the caller.
            self._announce(plan.notes, stacklevel=6)
        cached = () if plan.cache is None else (f"step cache: {plan.cache.note}",)
        notes = (*plan.notes, *choice.notes, *choice.warnings, *plan.stage_notes(), *cached)
        return replace(plan, notes=notes), prompt

    def _solver(self, scheduler: Any) -> SolverTable:
        """The scheduler's table; probed once per schedule."""
        key = (
            type(scheduler).__name__,
            repr(sorted(scheduler.config.items())),
            tuple(scheduler.sigmas.tolist()),
        )
        if key not in self._solvers:
            if len(self._solvers) >= _SCHEDULES:
                self._solvers.clear()
            self._solvers[key] = probe_scheduler(scheduler)
        return self._solvers[key]

    def _announce(self, notes: Sequence[str], stacklevel: int) -> None:
        """Says each thing once."""
        for note in notes:
            if note not in self._announced:
                self._announced.add(note)
                warnings.warn(note, stacklevel=stacklevel)


def check_latents(latents: Tensor, model: StepModel) -> None:
    """Refuses initial latents of a shape that the model does not take.

    Raises:
        ShapeError: Not `[B, C, H, W]`, for videos `[B, C, F, H, W]`.
    """
    channels = model.family.latent_channels(model.transformer)
    axes = "F, H, W" if model.family.video else "H, W"
    if latents.ndim != 2 + axes.count(",") + 1 or latents.shape[1] != channels:
        raise ShapeError(
            f"latents have shape {list(latents.shape)}; expected [B, {channels}, {axes}]"
        )
