"""Whole denoising runs with a fixed patch size for each step: trajectories, samples, gain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddit_rt.engine.intercepted import FirstStep, InterceptedRun
from ddit_rt.models import Family
from ddit_rt.models.calls import PipelineCall
from ddit_rt.models.layered import layered
from ddit_rt.steps import Bucket, Detail, FineBucket, Pass, RunContext, SnrBucket, StepModel

MakeCoarse = Callable[[StepModel, RunContext, int], Bucket]
"""Makes the bucket of a coarse size."""


def training_free(model: StepModel, context: RunContext, multiple: int) -> Bucket:
    """The coarse step without an adapter."""
    return SnrBucket(model, context, multiple)


class Prepared(NamedTuple):
    """What a loop begins with: z_0, `[B, C, H, W]`, conditioning, and a scheduler of its own."""

    latents: Tensor
    conditioning: dict[str, Any]
    scheduler: Any


def prepare(
    family: Family, pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], **arguments: Any
) -> Prepared:
    """The pipeline's call up to its loop: prompts encoded, noise drawn, each from its own seed."""
    given = {**arguments, **_of_prompts(prompts, seeds)}
    return Prepared(*FirstStep(*_read(family, pipeline, given))(given))


def rendered(
    loop: Callable[[Prepared], Tensor],
    family: Family,
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    **arguments: Any,
) -> Any:
    """What the pipeline's call returns with another loop in the place of its own."""
    given = {**arguments, **_of_prompts(prompts, seeds)}
    parts = _read(family, pipeline, given)
    return InterceptedRun(*parts, lambda *found: loop(Prepared(*found)))(given)


def _of_prompts(prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return {"prompt": list(prompts), "generator": generators}


def _read(
    family: Family, pipeline: Any, arguments: Mapping[str, Any]
) -> tuple[Any, Sequence[StepModel], PipelineCall]:
    """A call's pipeline, models and arguments, as `InterceptedRun` takes them."""
    layered(family, "training is not there")
    call = family.read_call(pipeline, copy.deepcopy(pipeline.scheduler), arguments)
    return pipeline, (StepModel(family=family, transformer=pipeline.transformer, base={}),), call


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
    latents, scheduler = prepared.latents, prepared.scheduler
    context = _context(model, prepared)
    buckets = _buckets(model, context, multiples, make_coarse)
    for step, (multiple, timestep) in enumerate(zip(multiples, scheduler.timesteps, strict=True)):
        index = torch.tensor([step], device=latents.device)
        velocity = buckets[multiple].velocity(latents, index).float()
        if record is not None:
            record(latents, velocity)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def _context(model: StepModel, prepared: Prepared) -> RunContext:
    latents, scheduler, device = prepared.latents, prepared.scheduler, prepared.latents.device
    return RunContext(
        passes=(Pass.of(model, prepared.conditioning),),
        height=latents.shape[-2],
        width=latents.shape[-1],
        sigmas=scheduler.sigmas[:-1].to(device, torch.float32),
        timesteps=model.family.linear_timesteps(scheduler).to(device),
        detail=Detail(tuple(latents.shape), device),
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
