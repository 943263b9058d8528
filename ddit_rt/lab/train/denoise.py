"""Whole denoising runs with a fixed patch size for each step: trajectories, samples, gain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddit_rt.adapters import AdapterSet, PatchAdapter
from ddit_rt.blocks import TokenRanges
from ddit_rt.engine.intercepted import FirstStep, InterceptedRun
from ddit_rt.loop import CpuExecutor
from ddit_rt.loop.cpu import VelocityWatch
from ddit_rt.models import Family
from ddit_rt.models.calls import PipelineCall
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
    compiled, latents = path.compiled(model, multiples), prepared.latents
    outline = outline_run(
        compiled,
        Request(policy=StaticPolicy(multiples)),
        shape=tuple(latents.shape),
        timesteps=model.family.linear_timesteps(prepared.scheduler),
        solver=probe_scheduler(prepared.scheduler),
    )
    plan = plan_run(compiled, outline, prepared.conditioning)
    final, _ = CpuExecutor().run(plan, latents, on_velocity=record)
    return final
