"""Whole denoising runs with a fixed patch size for each step: trajectories, samples, gain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddit_rt.models import Family
from ddit_rt.models.calls import PreparedCall
from ddit_rt.models.layered import layered
from ddit_rt.steps import Bucket, Detail, FineBucket, Pass, RunContext, SnrBucket, StepModel

MakeCoarse = Callable[[StepModel, RunContext, int], Bucket]
"""Makes the bucket of a coarse size."""


def training_free(model: StepModel, context: RunContext, multiple: int) -> Bucket:
    """The coarse step without an adapter."""
    return SnrBucket(model, context, multiple)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A pipeline call up to its loop, with a scheduler of its own."""

    call: PreparedCall
    scheduler: Any


def prepare(
    family: Family, pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], **arguments: Any
) -> Prepared:
    """Encodes prompts and draws noise, each from its own seed, as the pipeline's call does."""
    scheduler = copy.deepcopy(pipeline.scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    arguments = {"prompt": list(prompts), "generator": generators, **arguments}
    with torch.no_grad():
        call = layered(family, "training is not there").prepare(pipeline, scheduler, arguments)
    return Prepared(call=call, scheduler=scheduler)


@torch.no_grad()
def denoise(
    model: StepModel,
    prepared: Prepared,
    multiples: Sequence[int],
    make_coarse: MakeCoarse = training_free,
    record: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Runs the loop.

    Args:
        model: The model.
        prepared: A call by `prepare`; it is used up, since its scheduler is stepped.
        multiples: Patch size of each step, as a multiple of p.
        make_coarse: Makes the buckets that are not at p.
        record: Is shown z_k and v_k of each step, `[B, C, H, W]`.

    Returns:
        Final latents, `[B, C, H, W]`, float32.
    """
    call, scheduler = prepared.call, prepared.scheduler
    latents, context = call.latents, _context(model, prepared)
    buckets = _buckets(model, context, multiples, make_coarse)
    for step, (multiple, timestep) in enumerate(zip(multiples, scheduler.timesteps, strict=True)):
        index = torch.tensor([step], device=latents.device)
        velocity = buckets[multiple].velocity(latents, index).float()
        if record is not None:
            record(latents, velocity)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def _context(model: StepModel, prepared: Prepared) -> RunContext:
    call, scheduler, device = prepared.call, prepared.scheduler, prepared.call.latents.device
    return RunContext(
        passes=(Pass.of(model, call.conditioning),),
        height=call.latents.shape[-2],
        width=call.latents.shape[-1],
        sigmas=scheduler.sigmas[:-1].to(device, torch.float32),
        timesteps=model.family.linear_timesteps(scheduler).to(device),
        detail=Detail(tuple(call.latents.shape), device),
    )


def _buckets(
    model: StepModel, context: RunContext, multiples: Sequence[int], make_coarse: MakeCoarse
) -> Mapping[int, Bucket]:
    return {
        multiple: FineBucket(model, context)
        if multiple == 1
        else make_coarse(model, context, multiple)
        for multiple in sorted(set(multiples))
    }
