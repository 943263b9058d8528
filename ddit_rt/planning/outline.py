"""A run as it is known before its prompt is encoded: which steps run what, at which sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ddit_rt.artifact import public_config
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.layered import layered
from ddit_rt.planning.compiled import CompiledModel
from ddit_rt.planning.request import WHOLE_RUN, Request
from ddit_rt.policies import (
    DYNAMIC,
    CacheFit,
    CacheModel,
    CacheTable,
    NoCache,
    PolicyTable,
    Schedule,
    StepCache,
    patch_name,
    published_fits,
    published_spectrum,
)
from ddit_rt.solver import SolverTable
from ddit_rt.steps import StepModel, latent_frames


@dataclass(frozen=True, order=True, slots=True)
class Stage:
    """How the steps of a stage run the model.

    Attributes:
        expert: Place of the model among the engine's.
        unguided: Whether a run with guidance is not guided there.
    """

    expert: int
    unguided: bool

    @property
    def name(self) -> str:
        """What sets it apart; empty for the first expert, guided where the run is."""
        parts = [f"expert {self.expert + 1}"] * (self.expert > 0) + ["unguided"] * self.unguided
        return ", ".join(parts)


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
        cache: The step cache as a table; None: every step computes.
        batched_guidance: See `Request`.
        coarse: Whether the policy is to take coarse steps.
        notes: For the trace.
        warnings: Those of the notes that should be said aloud too.
    """

    shape: tuple[int, ...]
    timesteps: Tensor
    solver: SolverTable
    offered: tuple[int, ...]
    policy: PolicyTable
    guided: tuple[bool, ...]
    experts: tuple[int, ...]
    cache: CacheTable | None
    batched_guidance: bool
    coarse: bool
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def steps(self) -> int:
        """N."""
        return self.policy.steps

    @property
    def scored(self) -> bool:
        """Whether a step's decision needs the scores."""
        return any(map(self.policy.scored, range(self.steps)))

    def driven_by(self, driver: str, reason: str, solver: SolverTable, *, aloud: bool) -> Outline:
        """The run with something else than a table taking its steps, and why in its notes.

        Args:
            driver: What drives it.
            reason: Why.
            solver: `own_steps` of its scheduler.
            aloud: Whether to say so too: the caller has not asked for it.
        """
        note = f"driven by {driver}: {reason}"
        warnings = (*self.warnings, note) if aloud else self.warnings
        return replace(self, solver=solver, notes=(*self.notes, note), warnings=warnings)


def outline_run(
    compiled: CompiledModel,
    request: Request,
    *,
    shape: tuple[int, ...],
    timesteps: Tensor,
    solver: SolverTable,
    guided: bool = False,
    fits: Sequence[CacheFit] = (),
    experts: Sequence[int] = (),
) -> Outline:
    """Resolves a request for one shape and schedule.

    Args:
        compiled: The model.
        request: What is asked for.
        shape: See `Outline`.
        timesteps: See `Outline`.
        solver: See `Outline`.
        guided: Whether the run has classifier-free guidance.
        fits: Fits of step caches for this model, beside published ones.
        experts: See `Outline`; by default the first for all.

    Raises:
        ShapeError: The shape, or a size that the policy forces, cannot be run.
        ValueError: The policy cannot judge the steps of this solver, there is no guidance for the
            interval to bound, or the step cache has no fit for this model.
        UnsupportedModelError: A step cache for several experts.
    """
    experts = tuple(experts) or (0,) * len(timesteps)
    offered, missing = compiled.offered(shape[-2], shape[-1], latent_frames(shape))
    if request.policy.fine_share:
        offered, missing = _mixed(compiled, shape, offered, missing)
    compiled.check_batch(shape[0])
    table = request.policy.resolve(
        Schedule(
            sigmas=solver.sigmas,
            offered=offered,
            size=(shape[-2], shape[-1]),
            spectrum=spectrum_of(compiled.steps.transformer, fits),
        )
    )
    _refuse_scores_of_repeated_levels(table, solver, request)
    table = fine_at_switches(table, experts)
    guided_at = guided_steps(guided, request.guidance_interval, table.steps)
    stages, stage_of = stages_of(experts, guided_at)
    _refuse_cache(compiled, request.step_cache)
    cache = cache_table(request.step_cache, compiled.steps, timesteps, fits)
    if cache is not None:
        cache = computed_at_changes(cache, stage_of)
    cached = () if cache is None else (f"step cache: {cache.note}",)
    coarse = request.policy.sizes != {1}
    unguided = _unguided(guided, request.guidance_interval, guided_at)
    return Outline(
        shape=shape,
        timesteps=timesteps,
        solver=solver,
        offered=offered,
        policy=table,
        guided=guided_at,
        experts=experts,
        cache=cache,
        batched_guidance=request.batched_guidance,
        coarse=coarse,
        notes=(
            *missing,
            *request.notes,
            *request.warnings,
            *unguided,
            *([table.note] if table.note else ()),
            *([_mixed_note(table)] if table.fine_share else ()),
            *stage_notes(stages, stage_of),
            *cached,
        ),
        warnings=(*request.warnings, *unguided, *(missing if coarse else ())),
    )


def _unguided(
    guided: bool, interval: tuple[float, float], guided_at: Sequence[bool]
) -> tuple[str, ...]:
    """Says so where an interval that is not empty covers no whole step."""
    if not guided or any(guided_at) or interval[0] == interval[1]:
        return ()
    steps = len(guided_at)
    return (f"guidance_interval={interval} covers none of the {steps} steps: none is guided",)


def _mixed(
    compiled: CompiledModel,
    shape: Sequence[int],
    offered: tuple[int, ...],
    missing: tuple[str, ...],
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Patch sizes of mixed steps, and why others are not offered.

    Raises:
        UnsupportedModelError: Of a model whose family does not tell its layers.
        ValueError: With an adapter.
    """
    model = compiled.steps
    layered(model.family, "mixed steps (fine_share) are not there")
    if adapted := [patch_name(one) for one in offered if one in compiled.adapters.adapters]:
        raise ValueError(
            f"fine_share needs no training, and {', '.join(adapted)} would run by an adapter; "
            "leave fine_share out, or compile without the adapter"
        )
    edges = {multiple: model.patch_size * multiple for multiple in offered}
    divided = [one for one, edge in edges.items() if not (shape[-2] % edge or shape[-1] % edge)]
    notes = [
        f"{patch_name(one)} is not offered to mixed steps at this size: patches of {edge} latent "
        f"pixels do not divide {shape[-2]} x {shape[-1]}"
        for one, edge in edges.items()
        if one not in divided
    ]
    return tuple(divided), (*missing, *notes)


def _mixed_note(table: PolicyTable) -> str:
    return f"{table.fine_share:.0%} of the regions stay at p in coarse steps"


def _refuse_scores_of_repeated_levels(
    table: PolicyTable, solver: SolverTable, request: Request
) -> None:
    """Differences of latents say nothing where predicted and corrected ones take turns."""
    levels = solver.sigmas[:-1]
    if len(levels) > len(set(levels)) and any(map(table.scored, range(table.steps))):
        raise ValueError(
            f"{solver.source} visits each noise level twice, and {type(request.policy).__name__} "
            "compares the latents of successive levels; pass patch_policy=FinePolicy() or a "
            "StaticPolicy, or use another scheduler"
        )


def _refuse_cache(compiled: CompiledModel, step_cache: StepCache) -> None:
    """What is fitted for one model says nothing of a run that changes models, or of sound."""
    if isinstance(step_cache, NoCache):
        return
    if compiled.steps.family.soundtrack:
        raise UnsupportedModelError(
            f"got {type(step_cache).__name__} for a model with a soundtrack; what its blocks add "
            "to that is not kept. Leave step_cache out"
        )
    if compiled.experts and step_cache.of_one_model:
        raise UnsupportedModelError(
            f"got {type(step_cache).__name__} for a pipeline of {len(compiled.models)} experts; "
            "what it goes by is one model's. Pass SeaCache() or StaticCache(2)"
        )


def cache_table(
    step_cache: StepCache, model: StepModel, timesteps: Tensor, fits: Sequence[CacheFit]
) -> CacheTable | None:
    """The cache's table for a model; None: every step computes.

    Args:
        step_cache: What the caller asked for.
        model: The model.
        timesteps: t that the model is given at each step, `[N]`.
        fits: Those of the artifact, which come before published ones.

    Raises:
        ValueError: Nothing was fitted for the model, or the cache does not suit it.
    """
    if isinstance(step_cache, NoCache):
        return None
    transformer, family = model.transformer, model.family

    def changes(projected: bool) -> list[float]:
        # The host waits for these, once and before the run: they are its table.
        signal = model.layers.time_signal(transformer, timesteps, projected=projected)
        return relative_changes(signal)

    table = step_cache.resolve(
        CacheModel(
            name=type(transformer).__name__,
            steps=len(timesteps),
            fits=model_fits(transformer, fits),
            time_changes=changes if family.time_driven else None,
        )
    )
    if (
        table is not None
        and table.coefficients
        and table.power_exp is None
        and not table.first_block
    ):
        layered(family, f"{type(step_cache).__name__} needs a signal, which is not there")
    return table


def model_fits(transformer: nn.Module, fits: Sequence[CacheFit]) -> tuple[CacheFit, ...]:
    """What step caches can take of a model: fits of its artifact, and then published ones.

    Args:
        transformer: The model.
        fits: Those of the artifact.
    """
    config = public_config(transformer.config)  # type: ignore[arg-type]
    return (*fits, *published_fits(type(transformer).__name__, config))


def spectrum_of(transformer: nn.Module, fits: Sequence[CacheFit]) -> CacheFit:
    """The spectrum of a model's latents: of its artifact, else as published; see `model_fits`."""
    measured = (fit for fit in fits if fit.kind == "spectrum")
    config = public_config(transformer.config)  # type: ignore[arg-type]
    return next(measured, published_spectrum(type(transformer).__name__, config))


def relative_changes(rows: Tensor) -> list[float]:
    """Relative L1 change of consecutive rows `[N, m]`; 0 for the first."""
    change = rows.diff(dim=0).abs().mean(1) / rows[:-1].abs().mean(1)
    return [0.0, *change.to(torch.float64).tolist()]


def guided_steps(guided: bool, interval: tuple[float, float], steps: int) -> tuple[bool, ...]:
    """Which steps are guided where the run is; all of a run without guidance.

    Args:
        guided: Whether the run has guidance.
        interval: Start and stop as shares of the steps, rounded down to whole steps, as diffusers'
            guiders have it: steps k with int(start N) <= k < int(stop N) are guided.
        steps: N.

    Raises:
        ValueError: There is no guidance for the interval to bound.
    """
    start, stop = interval
    if not guided and interval != WHOLE_RUN:
        raise ValueError(
            f"got guidance_interval={interval} for a run without classifier-free guidance; ask "
            "for it (`guidance_scale` > 1 for Wan; `true_cfg_scale` > 1 and a negative prompt "
            "for FLUX), or leave the interval out"
        )
    return tuple(int(start * steps) <= step < int(stop * steps) for step in range(steps))


def stages_of(
    experts: Sequence[int], guided: Sequence[bool]
) -> tuple[tuple[Stage, ...], tuple[int, ...]]:
    """The stages of a run, in an order that does not depend on when they come, and each step's.

    Args:
        experts: Expert of every step, `[N]`.
        guided: Whether a step is guided where the run is, `[N]`.
    """
    steps = [Stage(expert, not on) for expert, on in zip(experts, guided, strict=True)]
    stages = tuple(sorted(set(steps)))
    return stages, tuple(map(stages.index, steps))


def stage_notes(stages: Sequence[Stage], stage_of: Sequence[int]) -> tuple[str, ...]:
    """For the trace: which steps run the model in another than the usual way."""
    runs = [
        (name, [step for step, _ in steps])
        for name, steps in itertools.groupby(
            enumerate(stage_of), key=lambda entry: stages[entry[1]].name
        )
    ]
    return tuple(f"steps {steps[0]} to {steps[-1]}: {name}" for name, steps in runs if name)


def fine_at_switches(table: PolicyTable, experts: Sequence[int]) -> PolicyTable:
    """Lets no score choose a coarse size for the first step of an expert that takes over.

    What coarse steps build on, the clean estimate of a step at p, is then its own.
    """
    forced, labels = list(table.forced), list(table.labels)
    for step in _changes(experts):
        if forced[step] == DYNAMIC:
            forced[step], labels[step] = 0, "first step of an expert"
    return replace(table, forced=tuple(forced), labels=tuple(labels))


def computed_at_changes(cache: CacheTable, stages: Sequence[int]) -> CacheTable:
    """Makes the first step of every stretch of a stage compute: there is nothing to reuse."""
    increments = list(cache.increments)
    for step in _changes(stages):
        increments[step] = float("nan")
    return replace(cache, increments=tuple(increments))


def _changes(values: Sequence[int]) -> list[int]:
    return [step for step in range(1, len(values)) if values[step] != values[step - 1]]
