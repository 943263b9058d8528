"""Buckets: one patch size with all its shapes fixed, as a function from latents to velocity.

`StepModel` is what a compiled model offers to every bucket; `RunContext` is what one run fixes
once (shapes, text tokens, schedule). A bucket is built from the two before the step loop, and
inside the loop only reads tables by the step's index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ddit_rt.families.base import Family, Grid, Runner

Runners = Mapping[str, Sequence[Runner]]
"""Blocks ready to run, by `BlockType.path`."""


class Bucket(Protocol):
    """One patch size of one run.

    Attributes:
        multiple: Patch size as a multiple of p.
        tokens: Image tokens of a step.
    """

    multiple: int
    tokens: int

    def velocity(self, latents: Tensor, step: int) -> Tensor:
        """The model's velocity.

        Args:
            latents: z_k, `[B, C, H, W]`, float32.
            step: k.

        Returns:
            `[B, C, H, W]`, in the model's dtype or float32.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """A transformer whose blocks are ready to run.

    Attributes:
        family: What is specific to the model's class.
        transformer: The user's own model; its embeddings and its weights are used in place.
        base: The unmodified blocks.
    """

    family: Family
    transformer: nn.Module
    base: Runners

    @property
    def patch_size(self) -> int:
        """p, in latent pixels."""
        return self.family.base_patch_size(self.transformer)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embeddings and blocks."""
        return self.family.embedding_layers(self.transformer)[0].weight.dtype

    def grid(self, height: int, width: int, multiple: int = 1) -> Grid:
        """Tokens of a latent of `height` x `width` at `multiple` times p."""
        patch = self.patch_size * multiple
        return Grid(height=height // patch, width=width // patch)


class Detail:
    """What a coarse step must not lose: the clean estimate of the latest step at p.

    Attributes:
        estimate: `[B, C, H, W]` float32; zeros until there is one.
        serial: Number of steps at p so far, a tensor, so that no step waits for the host.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.estimate = torch.zeros(shape)
        self.serial = torch.zeros((), dtype=torch.int64)

    def update(self, latents: Tensor, velocity: Tensor, sigma: Tensor) -> None:
        """Takes over x0 = z - t v of a step at p."""
        torch.addcmul(latents, velocity, sigma, value=-1, out=self.estimate)
        self.serial += 1


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What one run fixes before its first step.

    Attributes:
        conditioning: The run's conditioning tensors.
        text: Text tokens as the blocks take them, `[B, T, d]`.
        height: Latent rows.
        width: Latent columns.
        sigmas: Noise level of every step, `[N]`, float32, in (0, 1].
        timesteps: t that the model is given at every step, `[N]`, float32, in [0, 1].
        detail: Memory of the latest step at p; None when no coarse step can follow one.
    """

    conditioning: Mapping[str, Tensor]
    text: Tensor
    height: int
    width: int
    sigmas: Tensor
    timesteps: Tensor
    detail: Detail | None


def token_velocity(
    model: StepModel, hidden: Tensor, text: Tensor, temb: Tensor, positions: tuple[Tensor, ...]
) -> Tensor:
    """Embedded image tokens through the unmodified model: `[B, n, d]` to `[B, n, C*p*p]`."""
    hidden = model.family.run_blocks(model.base, hidden, text, temb, positions)
    hidden = model.family.modulate_output(model.transformer, hidden, temb)
    return model.family.project_output(model.transformer, hidden)
