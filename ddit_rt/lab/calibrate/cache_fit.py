"""Fits: what TeaCache, MagCache and `SpectralPolicy` have to know of a model, measured on it.

Every prompt runs once, every step computed at p. TeaCache's polynomial gives the relative L1
change of the model's output from that of its input signal (arXiv 2411.19108, section 3.3), by
least squares over all steps and prompts. MagCache's ratios are the mean over tokens of
|r_k| / |r_{k-1}|, r being what the blocks add (arXiv 2506.09045), averaged over prompts. The
spectrum is that of the final latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddit_rt.engine import Engine
from ddit_rt.lab.plans.points import Prompt
from ddit_rt.loop import CpuExecutor, RunPlan
from ddit_rt.planning.request import Request
from ddit_rt.policies import (
    CACHE_KINDS,
    CacheFit,
    FinePolicy,
    MagCache,
    NoCache,
    StepCache,
    TeaCache,
)
from ddit_rt.policies.cache_fit import KINDS
from ddit_rt.steps.buckets import dct

DEGREE = 4
"""Degree of the polynomials, as the published ones have it."""

_FEWEST = 4
"""Whole frequencies that the line through a spectrum is laid through at least."""
_TINY = 1e-30

_Fit = Callable[..., tuple[tuple[float, ...], dict[str, Any]]]
"""Values and evidence from what the runs have shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepChanges:
    """What one run has shown, from its second step on.

    Attributes:
        inputs: Relative L1 change of the signal, `[N - 1]`.
        outputs: Relative L1 change of the velocity, `[N - 1]`.
        ratios: Ratio of the residual's magnitude, `[N - 1]`.
    """

    inputs: tuple[float, ...]
    outputs: tuple[float, ...]
    ratios: tuple[float, ...]


def fit_cache(
    engine: Engine,
    kind: str,
    prompts: Sequence[Prompt],
    *,
    arguments: Mapping[str, Any],
    conditions: Mapping[str, Any],
    advance: Callable[[], object] = lambda: None,
) -> CacheFit:
    """Measures a model and fits what a step cache of a kind or, by its spectrum, a policy needs.

    Args:
        engine: The engine, with its pipeline.
        kind: One of `CACHE_KINDS`, or "spectrum".
        prompts: At least one.
        arguments: Further arguments of the engine's call, e.g. `num_inference_steps`.
        conditions: What the figures hold for: machine, versions; for the record.
        advance: It is called after every run.

    Raises:
        ValueError: An unknown kind, one that does not suit the model, or too few steps; of a
            spectrum, latents that are too small, or whose power does not fall.
    """
    if kind not in KINDS:
        raise ValueError(f"got the cache {kind!r}; fitted can be {list(KINDS)}")
    runs: list[Any] = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(prompt.seed)
        call = {**arguments, "prompt": prompt.text, "generator": generator}
        plan, latents = measuring_plan(engine, kind, **call)
        runs.append(watch(plan, latents) if plan.cache else CpuExecutor().run(plan, latents)[0])
        advance()
    steps = len(plan.stages)
    fits: dict[str, _Fit] = {"magcache": _ratios, "spectrum": _spectrum}
    fit: _Fit = fits.get(kind, _polynomial)
    values, found = fit(runs)
    evidence = {
        "prompts": [[prompt.text, prompt.seed] for prompt in prompts],
        "num_inference_steps": steps,
        **found,
        **conditions,
    }
    source = f"fitted on this model: {len(prompts)} prompts, {steps} steps"
    return CacheFit(kind=kind, values=values, source=source, evidence=evidence)


def measuring_plan(
    engine: Engine, kind: str = "teacache", **arguments: Any
) -> tuple[RunPlan, Tensor]:
    """A run of the pipeline with every step computed at p.

    For a step cache its buckets keep their residuals, and for TeaCache it holds the model's bare
    signal: a `Signal`, or the relative changes of a time embedding as the increments.

    Args:
        engine: The engine, with its pipeline.
        kind: As of `fit_cache`: what is to be fitted.
        arguments: Arguments of the pipeline's `__call__`.

    Returns:
        The plan and z_0; nothing has run.
    """
    cache: StepCache = NoCache()
    if kind == "magcache":
        cache = MagCache(mag_ratios=(1.0,))
    elif kind in CACHE_KINDS:
        ret = kind == "teacache-ret"
        cache = TeaCache(0.0, coefficients=(1.0, 0.0), first=1, last=0, use_ret_steps=ret)
    request = Request(
        policy=FinePolicy(), step_cache=cache, batched_guidance=engine.batched_guidance
    )
    return engine.plan_call(request, **arguments)


@torch.no_grad()
def watch(plan: RunPlan, latents: Tensor) -> StepChanges:
    """Runs a plan by the host's loop and measures what changes from step to step.

    Args:
        plan: A plan by `measuring_plan`.
        latents: z_0.
    """
    bucket, cache = plan.buckets[0][0], plan.cache
    assert bucket is not None, "a fine plan"
    assert cache is not None, "a plan that keeps residuals"
    before: list[tuple[Tensor, Tensor, list[Tensor]]] = []
    inputs, outputs, ratios = [], [], []

    def look(step: int, latents: Tensor, velocity: Tensor) -> None:
        residuals = [residual.clone() for residual in bucket.residuals()]
        if before:
            last_latents, last_velocity, last_residuals = before.pop()
            change = cache.table.increments[step]
            if cache.signal is not None:
                index = torch.tensor([step], device=latents.device)
                change = float(cache.signal.change(latents, last_latents, index).mean())
            inputs.append(change)
            outputs.append(_relative_change(velocity.float(), last_velocity))
            ratios.append(_magnitude_ratio(residuals, last_residuals))
        before.append((latents.clone(), velocity.float().clone(), residuals))

    # Every step computes: what would reuse is only measured.
    CpuExecutor().run(replace(plan, cache=None), latents, on_velocity=look)
    return StepChanges(inputs=tuple(inputs), outputs=tuple(outputs), ratios=tuple(ratios))


def _relative_change(now: Tensor, before: Tensor) -> float:
    return float((now - before).abs().mean() / before.abs().mean())


def _magnitude_ratio(now: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Mean over tokens, and over the passes of a step, of the ratio of norms."""
    ratios = [
        (one.float().norm(dim=-1) / (other.float().norm(dim=-1) + 1e-8)).mean()
        for one, other in zip(now, before, strict=True)
    ]
    return float(torch.stack(ratios).mean())


def _ratios(runs: Sequence[StepChanges]) -> tuple[tuple[float, ...], dict[str, Any]]:
    rows = np.array([run.ratios for run in runs])
    spread = float(rows.std(axis=0).mean())
    return (1.0, *rows.mean(axis=0).tolist()), {"mean_deviation_between_prompts": spread}


def _polynomial(runs: Sequence[StepChanges]) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Least squares over all steps and prompts.

    Raises:
        ValueError: Fewer different inputs than the polynomial has coefficients.
    """
    inputs = np.array([run.inputs for run in runs]).ravel()
    outputs = np.array([run.outputs for run in runs]).ravel()
    distinct = len(np.unique(inputs))
    if distinct <= DEGREE:
        raise ValueError(
            f"got {distinct} different changes of the signal, and a polynomial of degree {DEGREE} "
            f"needs at least {DEGREE + 1}; calibrate with more steps"
        )
    values = np.polyfit(inputs, outputs, DEGREE)
    missed = outputs - np.polyval(values, inputs)
    evidence = {
        "inputs": [float(inputs.min()), float(inputs.max())],
        "outputs": [float(outputs.min()), float(outputs.max())],
        "residual_rms": float(np.sqrt(np.mean(missed**2))),
        "points": len(inputs),
    }
    return tuple(values.tolist()), evidence


def _spectrum(finals: Sequence[Tensor]) -> tuple[tuple[float, ...], dict[str, Any]]:
    amplitude, decay, missed = power_law(finals)
    if decay <= 0:
        raise ValueError(
            f"got power that rises with the frequency as w^{-decay:.2g}; latents without a falling "
            "spectrum have nothing that SpectralPolicy could go by"
        )
    return (amplitude, decay), {"latents": list(finals[0].shape[1:]), "log_rms": missed}


def power_law(latents: Sequence[Tensor]) -> tuple[float, float, float]:
    """A and b of the power P(w) = A w^-b at spatial frequency w, in cycles over the shorter side.

    Power is the mean square of the coefficients of an orthonormal cosine transform, in which white
    noise of variance 1 has 1 at every frequency. The line is laid through its logarithms, of which
    the mean around each whole frequency counts once, from 1 to the highest that both sides have.

    Args:
        latents: `[B, C, H, W]`, or `[B, C, F, H, W]` frame by frame, all of one H and W, as the
            model is given them.

    Returns:
        A, b, and the root mean square of what the line misses, in logarithms to base e.

    Raises:
        ValueError: No latents, of several sizes, or too small ones.
    """
    sizes = {tuple(one.shape[-2:]) for one in latents}
    if len(sizes) != 1:
        raise ValueError(f"got latents of the sizes {sorted(sizes)}; expected some of one size")
    ((height, width),) = sizes
    shorter = min(side for side in (height, width) if side > 1) if max(height, width) > 1 else 1
    if shorter < 2 * _FEWEST:
        raise ValueError(
            f"got latents of {height} x {width}; a spectrum needs sides of {2 * _FEWEST} at least"
        )
    rows, columns = dct(height), dct(width)
    squares = [
        (rows @ one.double().cpu() @ columns.T).square().flatten(0, -3).mean(0) for one in latents
    ]
    power = torch.stack(squares).mean(0).clamp(min=_TINY).numpy()
    along = [np.arange(side) / (2 * side) * shorter for side in (height, width)]
    frequency = np.hypot(along[0][:, None], along[1][None, :])
    whole = np.rint(frequency).astype(int)
    places = [place for place in range(1, shorter // 2 + 1) if (whole == place).any()]
    # Means of logarithms: those of a steep law's power around a frequency lie above it.
    means = np.array([np.log(power[whole == place]).mean() for place in places])
    centres = np.array([np.log(frequency[whole == place]).mean() for place in places])
    slope, intercept = np.polyfit(centres, means, 1)
    missed = means - (intercept + slope * centres)
    return math.exp(intercept), -float(slope), float(np.sqrt(np.mean(missed**2)))
