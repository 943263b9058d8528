"""What an artifact needs in memory beside the weights, counted in bytes of tensors."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ddit_rt.artifact import Artifact, BucketEntry
from ddit_rt.models import family_of
from ddit_rt.models.base import Grid
from ddit_rt.models.layered import LayeredFamily
from ddit_rt.models.probe import meta_twin
from ddit_rt.models.quantised import stored_bytes
from ddit_rt.policies import parse_patch
from ddit_rt.solver import solver_of
from ddit_rt.steps import StepModel, latent_frames
from ddit_rt.steps.bound import without_data

_STEPS = 50
_FLOAT = 4
_HISTORY = 4
"""Latents of the history: the third difference and every solver table need the latest four."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketMemory:
    """State of one patch size in one run.

    Attributes:
        patch: Patch size by name.
        tokens: Image tokens of a step.
        positions_bytes: Position encodings.
        modulation_bytes: Modulation inputs and noise levels of all steps.
        correction_bytes: What a training-free coarse step keeps of the latest step at p.
        bytes: All of these.
        residual_bytes: What a run with a step cache keeps beside them, of every pass of the model
            in a step; twice as much with `residual_order=1`.
    """

    patch: str
    tokens: int
    positions_bytes: int
    modulation_bytes: int
    correction_bytes: int
    bytes: int
    residual_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelMemory:
    """Memory of a model with its artifact; activations are not counted.

    Attributes:
        weights_bytes: The weights of the transformer, and of its experts: one copy, whatever the
            number of patch sizes.
        height: Image height that all else was counted at; 1 of audio.
        width: Image width of the same; samples of audio.
        num_frames: Frames of the same; None for what has none.
        seconds: Length of audio of the same; None for images.
        text_tokens: Text tokens of the same.
        steps: Denoising steps of the same.
        passes: Passes of the model in a step of the same: 2 with classifier-free guidance alone.
        experts: Models that take turns in a run, each with tables and text of its own.
        solver: Class name of the pipeline's scheduler.
        latent_bytes: One sample's latents in float32.
        history_bytes: The latest latents.
        velocities_bytes: Past velocities that the solver combines with the newest.
        detail_bytes: The clean estimate of the latest step at p.
        text_bytes: Text tokens as the blocks take them, of each pass.
        buckets: Per patch size that this image size offers.
    """

    weights_bytes: int
    height: int
    width: int
    num_frames: int | None
    seconds: float | None
    text_tokens: int
    steps: int
    passes: int
    experts: int
    solver: str
    latent_bytes: int
    history_bytes: int
    velocities_bytes: int
    detail_bytes: int
    text_bytes: int
    buckets: tuple[BucketMemory, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """The run that is counted."""

    model: StepModel
    shape: tuple[int, ...]
    text_tokens: int
    steps: int
    passes: int
    experts: int

    @property
    def latent_bytes(self) -> int:
        return _FLOAT * math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.model.dtype.itemsize

    def grid(self, entry: BucketEntry) -> Grid:
        height, width = self.shape[-2:]
        multiple = parse_patch(entry.patch)
        return self.model.grid(height, width, multiple, latent_frames(self.shape))


@torch.no_grad()
def memory_of(artifact: Artifact, pipeline: Any, steps: int = _STEPS, **size: Any) -> ModelMemory:
    """Counts the memory of a run, batch 1.

    The run has the pipeline's scheduler, and guidance where the pipeline guides by default.

    Args:
        artifact: The artifact; none of its code is loaded.
        pipeline: The pipeline that it fits.
        steps: Denoising steps.
        size: Arguments of the pipeline's call that say the size, such as `height`; by default the
            artifact's own, else the pipeline's.
    """
    manifest, transformer = artifact.manifest, pipeline.transformer
    family = family_of(transformer, pipeline)
    models = (transformer, *family.experts(pipeline))
    call = {**manifest.pipeline_defaults, **size}
    height, width = family.call_size(pipeline, call)
    frames = call.get("num_frames", family.default_frames(pipeline))
    run = _Run(
        model=StepModel(family=family, transformer=transformer, base={}),
        shape=family.latent_shape(pipeline, height, width, 1, frames),
        text_tokens=manifest.ranges.text[1],
        steps=steps,
        passes=family.default_passes(),
        experts=len(models),
    )
    low, high = manifest.ranges.image
    offered = [entry for entry in manifest.buckets if low <= run.grid(entry).tokens <= high]
    coarse = len(offered) > 1
    text = run.passes * run.text_tokens * family.hidden_size(transformer) * run.itemsize
    text *= run.experts
    return ModelMemory(
        weights_bytes=sum(map(_module_bytes, models)),
        height=height,
        width=width,
        num_frames=frames,
        seconds=width / pipeline.sample_rate if family.audio else None,
        text_tokens=run.text_tokens,
        steps=steps,
        passes=run.passes,
        experts=run.experts,
        solver=type(pipeline.scheduler).__name__,
        latent_bytes=run.latent_bytes,
        history_bytes=_HISTORY * run.latent_bytes,
        velocities_bytes=(_velocity_depth(run, pipeline) - 1) * run.latent_bytes,
        detail_bytes=run.latent_bytes if coarse else 0,
        text_bytes=text,
        buckets=tuple(_bucket_memory(run, entry) for entry in offered),
    )


def _velocity_depth(run: _Run, pipeline: Any) -> int:
    scheduler = copy.deepcopy(pipeline.scheduler)
    height, width = run.shape[-2:]
    grid = run.model.grid(height, width, frames=latent_frames(run.shape))
    run.model.family.set_timesteps(scheduler, run.steps, None, grid)
    return solver_of(scheduler)[0].velocity_depth


def _bucket_memory(run: _Run, entry: BucketEntry) -> BucketMemory:
    model, multiple = run.model, parse_patch(entry.patch)
    height, width = run.shape[-2:]
    grid, size = run.grid(entry), model.small_size(height, width, multiple)
    positions, modulation = _tables(run, grid, size)
    modulation *= run.experts * run.passes
    correction = 0
    if multiple > 1:
        modulation += 2 * run.steps * _FLOAT
        correction = _FLOAT * math.prod((*run.shape[:-2], *size))
    positions_bytes = run.experts * positions
    hidden = model.family.hidden_size(model.transformer)
    return BucketMemory(
        patch=entry.patch,
        tokens=grid.tokens,
        positions_bytes=positions_bytes,
        modulation_bytes=modulation,
        correction_bytes=correction,
        bytes=positions_bytes + modulation + correction,
        residual_bytes=run.passes * grid.tokens * hidden * run.itemsize,
    )


def _tables(run: _Run, grid: Grid, size: tuple[int, int]) -> tuple[int, int]:
    """Bytes of position encodings and of the modulation of all steps, of one pass of one model.

    Of a model whose own forward runs the steps: what is held for a run, and for every step.
    """
    family, transformer = run.model.family, run.model.transformer
    if isinstance(family, LayeredFamily):
        positions = family.positions(transformer, grid, run.text_tokens)
        width = math.prod(family.modulation_shape(transformer))
        return sum(map(stored_bytes, positions)), run.steps * width * run.itemsize
    shape = (*run.shape[:-2], *size)
    bound, _ = without_data(family, meta_twin(transformer), shape, run.text_tokens, run.steps)
    held, timed = bound.held_tensors(), bound.timed_tensors()
    return sum(map(stored_bytes, held)), sum(map(stored_bytes, timed))


def _module_bytes(module: nn.Module) -> int:
    return sum(map(stored_bytes, (*module.parameters(), *module.buffers())))
