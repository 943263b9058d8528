"""A request to an engine: its checks, and the plan of its run by the engine's own defaults."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ddit_rt.artifact import Artifact
from ddit_rt.errors import ArtifactMismatchError, ShapeError
from ddit_rt.models.arguments import check_tensor
from ddit_rt.planning.compiled import CompiledModel
from ddit_rt.planning.outline import Outline, outline_run
from ddit_rt.planning.presets import (
    PolicyChoice,
    ResolvedPolicy,
    check_policy,
    parse_choice,
    resolve_choice,
)
from ddit_rt.policies import (
    DDiTPolicy,
    FinePolicy,
    NoCache,
    PatchPolicy,
    StepCache,
    policy_from_dict,
    step_cache_from_dict,
)
from ddit_rt.solver import SolverTable, solver_of
from ddit_rt.steps import StepModel

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
        self._solvers: dict[tuple[Any, ...], tuple[SolverTable, str]] = {}
        self.announced: set[str] = set()

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
        default = self.default_policy
        policy = default if policy is None else parse_choice(policy, default)
        choice = resolve_choice(policy, self.artifact.manifest, requested, arguments)
        check_policy(choice.policy, self._compiled.multiples)
        # Behind `choose`, the engine's call and its no_grad: the caller.
        self.announce(choice.warnings, stacklevel=5)
        return choice

    def ignored(self, choice: ResolvedPolicy, notes: tuple[str, ...]) -> ResolvedPolicy:
        """Says what a call asks for in vain: aloud once, and in the trace."""
        # Behind `ignored`, the engine's call and its no_grad: the caller.
        self.announce(notes, stacklevel=5)
        return replace(choice, notes=(*choice.notes, *notes))

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

    def outline(
        self,
        shape: tuple[int, ...],
        scheduler: Any,
        solver: SolverTable,
        choice: ResolvedPolicy,
        *,
        guided: bool,
        guidance_interval: tuple[float, float],
        step_cache: StepCache | None,
        experts: Sequence[int],
    ) -> Outline:
        """Fixes a run but for its prompt: `outline_run` with the defaults and the fits.

        Args:
            shape: As in `outline_run`.
            scheduler: The run's, its timesteps set.
            solver: As in `outline_run`.
            choice: What `choose` gave.
            guided: As in `outline_run`.
            guidance_interval: As in `outline_run`.
            step_cache: The caller's; None for that of a calibrated plan, else the default.
            experts: As in `outline_run`.
        """
        outline = outline_run(
            self._compiled,
            shape=shape,
            timesteps=self._compiled.steps.family.linear_timesteps(scheduler),
            solver=solver,
            policy=choice.policy,
            guided=guided,
            guidance_interval=guidance_interval,
            step_cache=step_cache or choice.step_cache or self.default_step_cache,
            fits=self.artifact.manifest.cache_fits,
            experts=experts,
        )
        if not isinstance(choice.policy, FinePolicy):
            # Behind `outline`, `Engine._outline`, the engine's call and its no_grad: the caller.
            self.announce(outline.notes, stacklevel=6)
        cached = () if outline.cache is None else (f"step cache: {outline.cache.note}",)
        notes = (*outline.notes, *choice.notes, *choice.warnings, *outline.stage_notes, *cached)
        return replace(outline, notes=notes)

    def solver(self, scheduler: Any) -> tuple[SolverTable, str]:
        """`solver_of` a scheduler; probed once per schedule."""
        key = (
            type(scheduler).__name__,
            repr(sorted(scheduler.config.items())),
            tuple(scheduler.sigmas.tolist()) if hasattr(scheduler, "sigmas") else (),
        )
        if key not in self._solvers:
            if len(self._solvers) >= _SCHEDULES:
                self._solvers.clear()
            self._solvers[key] = solver_of(scheduler)
        return self._solvers[key]

    def by_another(self, outline: Outline, driver: str, reason: str, *, aloud: bool) -> Outline:
        """An outline whose steps are not taken by a table, with the reason in its notes.

        Args:
            outline: The run's.
            driver: What drives it.
            reason: Why.
            aloud: Whether to say so once: the caller has not asked for it.
        """
        note = f"driven by {driver}: {reason}"
        if aloud:
            # Behind `by_another`, `Engine._drive`, the engine's call and its no_grad: the caller.
            self.announce((note,), stacklevel=6)
        return replace(outline, notes=(*outline.notes, note))

    def announce(self, notes: Sequence[str], stacklevel: int) -> None:
        """Says each thing once."""
        for note in notes:
            if note not in self.announced:
                self.announced.add(note)
                warnings.warn(note, stacklevel=stacklevel)


def check_latents(latents: Tensor, model: StepModel) -> None:
    """Refuses initial latents of a shape that the model does not take.

    Raises:
        TypeError: No tensor of floating-point numbers.
        ShapeError: Not `[B, C, H, W]`, for videos `[B, C, F, H, W]`.
    """
    channels = model.family.latent_channels(model.transformer)
    axes = "F, H, W" if model.family.video else "H, W"
    check_tensor("latents", latents, f"[B, {channels}, {axes}]")
    if latents.ndim != 2 + axes.count(",") + 1 or latents.shape[1] != channels:
        raise ShapeError(
            f"latents have shape {list(latents.shape)}; expected [B, {channels}, {axes}]"
        )
