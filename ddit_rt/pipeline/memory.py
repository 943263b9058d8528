"""What an artifact needs in memory beside the weights, counted in bytes of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddit_rt.artifact import Artifact
from ddit_rt.buckets import StepModel, latent_frames
from ddit_rt.families import family_of
from ddit_rt.patch_scheduler import parse_patch, patch_name

_STEPS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketMemory:
    """State of one patch size in one run.

    Attributes:
        patch: Patch size by name.
        tokens: Image tokens of a step.
        bytes: Position encodings and per-step modulation inputs.
        residual_bytes: What a run with a step cache keeps beside them, for each pass of the model
            in a step: classifier-free guidance has two.
    """

    patch: str
    tokens: int
    bytes: int
    residual_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelMemory:
    """Memory of a model with its artifact; activations are not counted.

    Attributes:
        weights_bytes: The transformer's weights: one copy, whatever the number of patch sizes.
        height: Picture height that `buckets` was counted at.
        width: Picture width of the same.
        text_tokens: Text tokens of the same.
        steps: Denoising steps of the same.
        buckets: Per patch size that this picture size offers.
    """

    weights_bytes: int
    height: int
    width: int
    text_tokens: int
    steps: int
    buckets: tuple[BucketMemory, ...]


@torch.no_grad()
def memory_of(artifact: Artifact, pipeline: Any, steps: int = _STEPS) -> ModelMemory:
    """Counts the memory of a run at the artifact's own picture size, batch 1.

    Args:
        artifact: The artifact; none of its code is loaded.
        pipeline: The pipeline that it fits.
        steps: Denoising steps.
    """
    manifest, transformer = artifact.manifest, pipeline.transformer
    family = family_of(transformer)
    rows, columns = family.default_size(pipeline)
    height = int(manifest.pipeline_defaults.get("height", rows))
    width = int(manifest.pipeline_defaults.get("width", columns))
    num_frames = manifest.pipeline_defaults.get("num_frames")
    text_tokens = manifest.ranges.text[1]
    model = StepModel(family=family, transformer=transformer, base={})
    shape = family.latent_shape(pipeline, height, width, 1, num_frames)
    rows, columns = shape[-2:]
    multiples = [parse_patch(entry.patch) for entry in manifest.buckets]
    buckets = tuple(
        _bucket_memory(model, shape, multiple, text_tokens, steps)
        for multiple in multiples
        if rows % (multiple * model.patch_size) == 0 == columns % (multiple * model.patch_size)
    )
    return ModelMemory(
        weights_bytes=_module_bytes(transformer),
        height=height,
        width=width,
        text_tokens=text_tokens,
        steps=steps,
        buckets=buckets,
    )


def _bucket_memory(
    model: StepModel, shape: tuple[int, ...], multiple: int, text_tokens: int, steps: int
) -> BucketMemory:
    """What every kind of bucket keeps for a run: positions, and a modulation input per step."""
    grid = model.grid(shape[-2], shape[-1], multiple, latent_frames(shape))
    positions = model.family.positions(model.transformer, grid, text_tokens)
    width = math.prod(model.family.modulation_shape(model.transformer))
    item = torch.finfo(model.dtype).bits // 8
    modulation = steps * width * item
    return BucketMemory(
        patch=patch_name(multiple),
        tokens=grid.tokens,
        bytes=sum(_tensor_bytes(tensor) for tensor in positions) + modulation,
        residual_bytes=grid.tokens * model.family.hidden_size(model.transformer) * item,
    )


def _module_bytes(module: nn.Module) -> int:
    return sum(_tensor_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
