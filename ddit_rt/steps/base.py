"""Buckets: one patch size with all its shapes fixed, as a function from latents to velocity.

`StepModel` is what a compiled model offers to every bucket; `RunContext` is what one run fixes
once (shapes, text tokens, schedule). A bucket is built from the two before the step loop, and
inside the loop only reads tables by the step's index, a tensor: nothing that changes from step to
step passes through Python, so that a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddit_rt import ops
from ddit_rt.models.base import Grid, Runner
from ddit_rt.models.family import Family
from ddit_rt.models.layered import (
    ALL_BLOCKS,
    FIRST_BLOCK,
    LATER_BLOCKS,
    LayeredFamily,
    layered,
)
from ddit_rt.steps.first_block import FirstBlock
from ddit_rt.steps.residual import Residual

Runners = Mapping[str, Sequence[Runner]]
"""Blocks ready to run, by `BlockType.key`."""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What a pass of a step is given beside its latents.

    Attributes:
        sigma: Noise level, `[]`.
        timestep: t that the model is given, `[1]`, in [0, 1].
        conditioning: The pass's conditioning tensors.
    """

    sigma: Tensor
    timestep: Tensor
    conditioning: Mapping[str, Tensor]


class Bucket(Protocol):
    """One patch size of one run.

    Attributes:
        multiple: Patch size as a multiple of p.
        tokens: Image tokens of a step.
    """

    multiple: int
    tokens: int

    def velocity(
        self, latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = True
    ) -> Tensor:
        """The model's velocity.

        Args:
            latents: z_k, `[B, C, H, W]`, of a video `[B, C, F, H, W]`, float32.
            step: k, `[1]`, int32 or int64, on the latents' device.
            reuse: Whether the latest residual of this bucket stands for its blocks; then a
                velocity was computed before, under a step cache, and guided as this one is.
            guided: Whether a run with guidance is guided in this step; without, the pass with the
                prompt is all that runs.

        Returns:
            The same shape, in the model's dtype or float32.
        """
        ...

    def residuals(self) -> tuple[Tensor, ...]:
        """What its blocks added when they last ran, `[B, n, d]` for each pass of a step.

        Only under a step cache, and after a velocity was computed.
        """
        ...

    def sound(self) -> Tensor | None:
        """Velocity of the soundtrack that came with the latest velocity, of its only pass.

        In the pipeline's layout; overwritten by the next one. None without a soundtrack.
        """
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """What this run's bucket reads or keeps beside the model's weights and the context.

        Two buckets of one patch size and shape have equally many, of equal shapes, in the same
        order: a captured graph is given another run by copying that run's tensors into its own.
        """
        ...

    def state(self) -> tuple[Tensor, ...]:
        """What it keeps from step to step beside residuals, of equal shapes as `tensors` are."""
        ...

    def refresh(self, step: int, now: StepInputs) -> None:
        """Writes what a step reads into its text and its row of the tables, all in place.

        Only of a bucket that runs one pass; the run's tables may have said something else.
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
        return self.family.patch

    @property
    def layers(self) -> LayeredFamily:
        """The family of a model that tells its layers; for others `UnsupportedModelError`."""
        return layered(self.family, "adapters and TeaCache are not there")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embeddings and blocks."""
        return self.family.first_weight(self.transformer).dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.family.first_weight(self.transformer).device

    def grid(self, height: int, width: int, multiple: int = 1, frames: int = 0) -> Grid:
        """Tokens of a latent of `height` x `width` at `multiple` times p; 0 frames: an image.

        A patch that reaches over an edge counts as one.
        """
        patch = self.patch_size * multiple
        rows, columns = -(-height // patch), -(-width // patch)
        return Grid(height=rows, width=columns, frames=frames or 1)

    def small_size(self, height: int, width: int, multiple: int) -> tuple[int, int]:
        """Latent rows and columns of the small image that has as many tokens at p."""
        grid, patch = self.grid(height, width, multiple), self.patch_size
        return grid.height * patch, grid.width * patch

    def unpack(self, tokens: Tensor, height: int, width: int, frames: int) -> Tensor:
        """Latents from what the de-embedding made of patches of p x p; 0 frames: an image."""
        return ops.unpack(
            tokens,
            self.patch_size,
            height,
            width,
            frames=frames,
            channels_last=self.family.channels_last,
        )


class Detail:
    """What a coarse step must not lose: the clean estimate of the latest step at p.

    Attributes:
        estimate: Shape of the latents, float32; zeros until there is one.
        serial: Number of steps at p so far, a tensor, so that no step waits for the host.
        moved: By how much the latest step at p changed the estimate; None where no step is mixed.
        corrections: What the coarse step of each patch size keeps of it, by multiple; made by the
            bucket, and one for all models of the run.
    """

    def __init__(
        self, shape: tuple[int, ...], device: torch.device, *, mixed: bool = False
    ) -> None:
        """Nothing is kept yet; `mixed`: whether coarse steps leave regions at p."""
        self.estimate = torch.zeros(shape, dtype=torch.float32, device=device)
        self.moved = torch.zeros_like(self.estimate) if mixed else None
        self.serial = torch.zeros(1, dtype=torch.int32, device=device)
        self.corrections: dict[int, Any] = {}

    def state(self) -> tuple[Tensor, ...]:
        """What it keeps from step to step."""
        return (self.estimate, self.serial, *([] if self.moved is None else [self.moved]))

    def update(self, latents: Tensor, velocity: Tensor, sigma: Tensor) -> None:
        """Takes over x0 = z - t v of a step at p."""
        if self.moved is not None:
            self.moved.copy_(self.estimate)
        torch.addcmul(latents, velocity, sigma, value=-1, out=self.estimate)
        if self.moved is not None:
            torch.sub(self.estimate, self.moved, out=self.moved)
        self.serial += 1


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of the model in a step; it may hold cond and uncond as one batch, cond first.

    Attributes:
        conditioning: Its conditioning; copies of tensors where steps read them.
        text: Text tokens, `[B, T, D]`, or `[2 B, T, D]` of cond and uncond: as the model's forward
            takes them, or as its blocks do, where the family tells its layers.
        tensors: What a captured run is given by copying it.
    """

    conditioning: Mapping[str, Any]
    text: Tensor
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: StepModel, conditioning: Mapping[str, Any]) -> Pass:
        """The pass of a conditioning."""
        family = model.family
        if isinstance(family, LayeredFamily):
            text = family.embed_text(model.transformer, conditioning)
            return cls(conditioning=conditioning, text=text, tensors=(text,))
        own = {
            name: _own(value, model, exact=name in family.exact)
            for name, value in conditioning.items()
        }
        tensors = tuple(value for value in own.values() if isinstance(value, Tensor))
        return cls(conditioning=own, text=own[family.text], tensors=tensors)


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What one run fixes before its first step.

    Attributes:
        passes: Passes of the model in a step: one, or one of cond and uncond, or two.
        height: Latent rows.
        width: Latent columns.
        frames: Latent frames; 0 for images, whose latents have no such dimension.
        sigmas: Noise level of every step, `[M]`, float32, in (0, 1]. M is at least the number of
            steps; rows beyond it are never read.
        timesteps: t that the model is given at every step, `[M]`, float32, in [0, 1].
        detail: Memory of the latest step at p; None when no coarse step can follow one.
        scales: Guidance scale of every step, `[M]`, float32, read on the device; None without
            guidance.
        residuals: Computed steps of which buckets keep what their blocks added, so that others may
            reuse it: 0, 1, or 2 to extrapolate.
        steps: Rows of the tables that are read; 0 for all.
        unguided: Whether some steps of a run with guidance are not guided.
        first_blocks: Of every pass, at p, where the step cache goes by what they add.
        late: Whether what a pass is given may change between a step's decision and the step: then
            the step runs its first block anew.
    """

    passes: tuple[Pass, ...]
    height: int
    width: int
    sigmas: Tensor
    timesteps: Tensor
    detail: Detail | None
    frames: int = 0
    scales: Tensor | None = None
    residuals: int = 0
    steps: int = 0
    unguided: bool = False
    first_blocks: tuple[FirstBlock, ...] = ()
    late: bool = False

    def tensors(self) -> tuple[Tensor, ...]:
        """As `Bucket.tensors`, for what all buckets of the run share."""
        detail = () if self.detail is None else self.detail.state()
        scales = () if self.scales is None else (self.scales,)
        passes = (tensor for one in self.passes for tensor in one.tensors)
        first_blocks = (tensor for one in self.first_blocks for tensor in one.tensors())
        return (*passes, self.sigmas, *scales, *detail, *first_blocks)


def _own(value: Any, model: StepModel, *, exact: bool) -> Any:
    """A copy of a tensor where the model is, in its dtype if it holds floating-point numbers."""
    if not isinstance(value, Tensor):
        return value
    dtype = model.dtype if value.is_floating_point() and not exact else value.dtype
    return value.to(model.device, dtype, memory_format=torch.contiguous_format, copy=True)


class Blocks:
    """The blocks of one bucket, and what they added to the image tokens when they last ran."""

    def __init__(
        self,
        model: StepModel,
        runners: Runners,
        residual: Residual | None = None,
        first_block: FirstBlock | None = None,
    ) -> None:
        """With a `first_block`, `begin` has run it whenever the blocks are called."""
        self._family = model.layers
        self._runners = runners
        self._first_block = first_block
        self.residual = residual

    def begin(
        self, hidden: Tensor, text: Tensor, temb: Tensor, positions: tuple[Tensor, ...]
    ) -> None:
        """Runs the first block alone, into `first_block`."""
        assert self._first_block is not None, "something goes by what it adds"
        given = self._family.run_blocks(self._runners, hidden, text, temb, positions, FIRST_BLOCK)
        self._first_block.take(hidden, given, image=0)

    def __call__(
        self,
        hidden: Tensor,
        text: Tensor,
        temb: Tensor,
        positions: tuple[Tensor, ...],
        step: Tensor | None = None,
        *,
        reuse: bool = False,
    ) -> Tensor:
        """Image tokens `[B, n, d]` through the blocks, or with their residual added.

        Where there is a residual, `step` is k, `[1]`.
        """
        which = ALL_BLOCKS
        if self._first_block is not None:
            (hidden, text), which = self._first_block.given(len(hidden)), LATER_BLOCKS
        if reuse:
            assert self.residual is not None, "a step reuses what an earlier one has computed"
            assert step is not None, "a residual is of a step"
            return self.residual.added_to(hidden, step)
        after, _ = self._family.run_blocks(self._runners, hidden, text, temb, positions, which)
        if self.residual is None:
            return after
        assert step is not None, "a residual is of a step"
        self.residual.keep(hidden, after, step)
        return after


def latent_frames(shape: Sequence[int]) -> int:
    """Frames of latents `[B, C, F, H, W]`; 0 for those of images, `[B, C, H, W]`."""
    return shape[2] if len(shape) == 5 else 0


def at_step(table: Tensor, step: Tensor) -> Tensor:
    """A step's row of a table `[M, ...]`, without the leading dimension, read on the device."""
    return table.index_select(0, step).squeeze(0)


def token_velocity(
    model: StepModel,
    hidden: Tensor,
    text: Tensor,
    temb: Tensor,
    positions: tuple[Tensor, ...],
) -> Tensor:
    """Embedded image tokens through the unmodified model: `[B, n, d]` to `[B, n, C*p*p]`.

    Args:
        model: The model.
        hidden: Image tokens.
        text: Text tokens, `[B, T, d]`.
        temb: Modulation input, `[B, *modulation_shape]`.
        positions: Position encodings, as the family makes them.
    """
    hidden = Blocks(model, model.base)(hidden, text, temb, positions)
    hidden = model.layers.modulate_output(model.transformer, hidden, temb)
    return model.layers.project_output(model.transformer, hidden)
