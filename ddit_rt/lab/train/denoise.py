"""Whole denoising runs with a fixed patch size for each step: trajectories, samples, gain."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddit_rt.adapters import AdapterSet, PatchAdapter
from ddit_rt.blocks import TokenRanges
from ddit_rt.loop import CpuExecutor
from ddit_rt.loop.cpu import VelocityWatch
from ddit_rt.models import Family
from ddit_rt.models.calls import PreparedCall
from ddit_rt.models.layered import layered
from ddit_rt.planning.compiled import CompiledModel
from ddit_rt.planning.outline import outline_run
from ddit_rt.planning.plan import plan_run
from ddit_rt.planning.request import Request
from ddit_rt.policies import StaticPolicy
from ddit_rt.solver import probe_scheduler
from ddit_rt.steps import Runners, StepModel

_ANY = (1, 2**62)
_RANGES = TokenRanges(batch=_ANY, image=_ANY, text=_ANY)
"""Blocks that are not compiled take every size."""


@dataclass(frozen=True, kw_only=True)
class CoarsePath:
    """A way to take the coarse patch sizes.

    Attributes:
        adapter: The adapter of the size; None for the training-free step.
        runners: The blocks that it runs with.
    """

    adapter: PatchAdapter | None = None
    runners: Runners | None = None

    def compiled(self, model: StepModel, multiples: Sequence[int]) -> CompiledModel:
        """A model that takes patch sizes this way, as a run is planned for.

        Args:
            model: The model.
            multiples: Patch sizes of the run, as multiples of p.
        """
        adapters, runners = {}, {}
        if self.adapter is not None:
            multiple = self.adapter.config.multiple
            adapters, runners = {multiple: self.adapter}, {multiple: self.runners or model.base}
        return CompiledModel(
            steps=model,
            multiples=tuple(sorted({1, *multiples})),
            ranges=_RANGES,
            adapters=AdapterSet(adapters=adapters),
            adapter_runners=runners,
        )


UNADAPTED = CoarsePath()


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
    path: CoarsePath = UNADAPTED,
    record: VelocityWatch | None = None,
) -> Tensor:
    """Runs the loop.

    Args:
        model: The model.
        prepared: A call by `prepare`.
        multiples: Patch size of each step, as a multiple of p.
        path: How the sizes that are not p are taken.
        record: Is shown k, z_k and v_k of each step, `[B, C, H, W]`.

    Returns:
        Final latents, `[B, C, H, W]`, float32.

    Raises:
        UnsupportedModelError: The scheduler's steps are no table; it draws noise, say.
    """
    compiled, call = path.compiled(model, multiples), prepared.call
    outline = outline_run(
        compiled,
        Request(policy=StaticPolicy(multiples)),
        shape=tuple(call.latents.shape),
        timesteps=model.family.linear_timesteps(prepared.scheduler),
        solver=probe_scheduler(prepared.scheduler),
    )
    plan = plan_run(compiled, outline, call.conditioning)
    latents, _ = CpuExecutor().run(plan, call.latents, on_velocity=record)
    return latents
