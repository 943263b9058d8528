"""A run as it is known before its prompt is encoded: which steps run what, at which sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.planning.caching import resolve_cache
from ddit_rt.planning.compiled import CompiledModel
from ddit_rt.planning.guidance import WHOLE_RUN, guided_steps
from ddit_rt.planning.stages import computed_at_changes, fine_at_switches, stage_notes, stages_of
from ddit_rt.policies import (
    CacheFit,
    NoCache,
    PatchPolicy,
    PolicyTable,
    ResolvedCache,
    Schedule,
    StepCache,
)
from ddit_rt.solver import SolverTable
from ddit_rt.steps import latent_frames

_NO_CACHE = NoCache()


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A run without its prompt.

    Attributes:
        shape: Latent shape `[B, C, H, W]` or `[B, C, F, H, W]`.
        timesteps: t that the model is given at each step, `[N]`.
        solver: Solver table.
        offered: Patch sizes that the shape offers, as multiples of p.
        policy: The patch policy as a table.
        guided: Which steps are guided where the run is, `[N]`.
        experts: Which of the models each step runs, `[N]`.
        cache: The step cache; None: every step computes.
        notes: For the trace: sizes that are not offered, and why.
        stage_notes: For the trace: which steps run the model in another than the usual way.
    """

    shape: tuple[int, ...]
    timesteps: Tensor
    solver: SolverTable
    offered: tuple[int, ...]
    policy: PolicyTable
    guided: tuple[bool, ...]
    experts: tuple[int, ...]
    cache: ResolvedCache | None
    notes: tuple[str, ...]
    stage_notes: tuple[str, ...]

    @property
    def steps(self) -> int:
        """N."""
        return self.policy.steps

    @property
    def scored(self) -> bool:
        """Whether a step's decision needs the scores."""
        return any(map(self.policy.scored, range(self.steps)))


def outline_run(
    compiled: CompiledModel,
    *,
    shape: tuple[int, ...],
    timesteps: Tensor,
    solver: SolverTable,
    policy: PatchPolicy,
    guided: bool = False,
    guidance_interval: tuple[float, float] = WHOLE_RUN,
    step_cache: StepCache = _NO_CACHE,
    fits: Sequence[CacheFit] = (),
    experts: Sequence[int] = (),
) -> Outline:
    """Resolves the policy and the step cache for this shape and schedule.

    Args:
        compiled: The model.
        shape: See `Outline`.
        timesteps: See `Outline`.
        solver: See `Outline`.
        policy: Patch policy.
        guided: Whether the run has classifier-free guidance.
        guidance_interval: Where it is guided, as shares of its steps.
        step_cache: Which steps reuse instead of compute.
        fits: Fits of step caches for this model, beside published ones.
        experts: See `Outline`; by default the first for all.

    Raises:
        ShapeError: The shape, or a size that the policy forces, cannot be run.
        ValueError: The policy cannot judge the steps of this solver, the interval is none, or the
            step cache has no fit for this model.
        UnsupportedModelError: A step cache for several experts.
    """
    experts = tuple(experts) or (0,) * len(timesteps)
    offered, notes = compiled.offered(shape[-2], shape[-1], latent_frames(shape))
    compiled.check_batch(shape[0])
    table = policy.resolve(Schedule(sigmas=solver.sigmas, offered=offered))
    _refuse_scores_of_repeated_levels(table, solver, policy)
    table = fine_at_switches(table, experts)
    steps = guided_steps(guided, guidance_interval, table.steps)
    stages, stage_of = stages_of(experts, steps)
    _refuse_cache_of_experts(compiled, step_cache)
    cache = resolve_cache(step_cache, compiled.steps, timesteps, fits)
    if cache is not None:
        cache = computed_at_changes(cache, stage_of)
    return Outline(
        shape=shape,
        timesteps=timesteps,
        solver=solver,
        offered=offered,
        policy=table,
        guided=steps,
        experts=experts,
        cache=cache,
        notes=notes,
        stage_notes=stage_notes(stages, stage_of),
    )


def _refuse_scores_of_repeated_levels(
    table: PolicyTable, solver: SolverTable, policy: PatchPolicy
) -> None:
    """Differences of latents say nothing where predicted and corrected ones take turns."""
    levels = solver.sigmas[:-1]
    if len(levels) > len(set(levels)) and any(map(table.scored, range(table.steps))):
        raise ValueError(
            f"{solver.source} visits each noise level twice, and {type(policy).__name__} compares "
            "the latents of successive levels; pass patch_policy=FinePolicy() or a StaticPolicy, "
            "or use another scheduler"
        )


def _refuse_cache_of_experts(compiled: CompiledModel, step_cache: StepCache) -> None:
    """What is fitted for one model says nothing of a run that changes models."""
    if compiled.experts and not isinstance(step_cache, NoCache):
        raise UnsupportedModelError(
            f"got {type(step_cache).__name__} for a pipeline of {len(compiled.models)} experts; "
            "fits of step caches are for one model. Leave step_cache out"
        )
