"""The passes of a step as calls of the model's own forward; see `passes.py` for guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ddit_rt.models.base import Grid
from ddit_rt.models.layered import LayeredFamily
from ddit_rt.steps.base import Pass, RunContext, Runners, StepModel, at_step
from ddit_rt.steps.bound import BoundModel
from ddit_rt.steps.first_block import FirstBlock
from ddit_rt.steps.passes import Passes
from ddit_rt.steps.residual import Residual


def make_passes(
    model: StepModel,
    context: RunContext,
    grid: Grid,
    size: tuple[int, int],
    levels: Tensor,
    *,
    runners: Runners | None = None,
    first_blocks: Sequence[FirstBlock] = (),
) -> Passes | ForwardPasses:
    """The passes of a patch size that sees latents of `size`, in the way of the model's family.

    Args:
        model: The model.
        context: The run.
        grid: Image tokens.
        size: Rows and columns of the latents that the model sees.
        levels: t that the model is given at every step, `[M]`, float32, in [0, 1].
        runners: The blocks; by default the unmodified ones.
        first_blocks: Of every pass, where they run ahead of the others.
    """
    if isinstance(model.family, LayeredFamily):
        return Passes(model, context, grid, levels, runners=runners, first_blocks=first_blocks)
    frames = (context.frames,) if context.frames else ()
    shape = (model.family.latent_channels(model.transformer), *frames, *size)
    return ForwardPasses(model, context, shape, levels, runners=runners, first_blocks=first_blocks)


class ForwardPasses:
    """The passes of one patch size, for latents of one size."""

    def __init__(
        self,
        model: StepModel,
        context: RunContext,
        shape: tuple[int, ...],
        levels: Tensor,
        *,
        runners: Runners | None = None,
        first_blocks: Sequence[FirstBlock] = (),
    ) -> None:
        """Prepares what stays the same in every step.

        Args:
            model: The model.
            context: The run.
            shape: Shape of the latents that the model sees, without the batch: `[C, h, w]`, of a
                video `[C, F, h, w]`.
            levels: t that the model is given at every step, `[M]`, float32, in [0, 1].
            runners: The blocks; by default the unmodified ones.
            first_blocks: See `make_passes`.
        """
        self._family = model.family
        self._scales = context.scales
        self._levels = levels
        runners = model.base if runners is None else runners
        ahead: Sequence[FirstBlock | None] = first_blocks or [None] * len(context.passes)
        self._passes = [
            _Pass(model, context, one, shape, levels, runners, first_block)
            for one, first_block in zip(context.passes, ahead, strict=True)
        ]
        self._unguided = self._passes[0]
        if context.unguided and len(context.passes) == 1:
            # In a step without guidance the samples with the prompt run by themselves.
            self._unguided = _Pass(
                model, context, context.passes[0], shape, levels, runners, ahead[0], half=True
            )

    def begin(self, latents: Tensor, step: Tensor) -> None:
        """Runs the first block of every pass."""
        for one in self._passes:
            copies = one.samples // len(latents)
            one.begin(torch.cat([latents] * copies), self._levels, step)

    def velocity(
        self, latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = True
    ) -> Tensor:
        """Velocity of latents `[B, ...]` of this size; see `Bucket.velocity`."""
        family = self._family
        shape = tuple(latents.shape)
        if self._scales is None or not guided:
            raw = self._unguided(latents, self._levels, step, reuse)
            return family.unpack_latents(raw, shape)
        if len(self._passes) == 1:
            both = self._passes[0](torch.cat((latents, latents)), self._levels, step, reuse)
            prompt, negative = both.chunk(2)
        else:
            prompt, negative = (one(latents, self._levels, step, reuse) for one in self._passes)
        joined = family.join(prompt, negative, at_step(self._scales, step))
        return family.unpack_latents(joined, shape)

    def refresh(self, step: int, level: Tensor, conditioning: Mapping[str, Any]) -> None:
        """As `Bucket.refresh`, of the only pass; `level` is `[1]`."""
        self._levels[step].copy_(level.reshape(()))
        (one,) = self._passes
        one.refresh(step, level, conditioning)

    def residuals(self) -> tuple[Tensor, ...]:
        """See `Bucket.residuals`."""
        return tuple(one.residual.latest for one in self._distinct() if one.residual is not None)

    def sound(self) -> Tensor | None:
        """As `Bucket.sound`."""
        return self._passes[0].sound

    def tensors(self) -> tuple[Tensor, ...]:
        """As `Bucket.tensors`."""
        return (self._levels, *(tensor for one in self._distinct() for tensor in one.tensors()))

    def _distinct(self) -> list[_Pass]:
        """The passes, and that of steps without guidance where it is none of them."""
        own = self._unguided is not self._passes[0]
        return [*self._passes, *([self._unguided] if own else [])]


class _Pass:
    """One pass at one size."""

    def __init__(
        self,
        model: StepModel,
        context: RunContext,
        one: Pass,
        shape: tuple[int, ...],
        levels: Tensor,
        runners: Runners,
        first_block: FirstBlock | None,
        *,
        half: bool = False,
    ) -> None:
        """`half`: whether it has but the first half of the pass's samples."""
        family, transformer = model.family, model.transformer
        self._family, self._dtype, self._conditioning = family, model.dtype, one.conditioning
        self._rows = len(one.text) // 2 if half else None
        self.sound: Tensor | None = None
        self._bound = BoundModel(
            transformer,
            family.read_blocks(transformer),
            runners,
            held=family.held,
            timed=family.timed,
            residual=Residual(context.residuals, context.sigmas) if context.residuals else None,
            first_block=first_block,
            image_first=family.image_first,
            arrange=family.block_call,
        )
        self.samples = self._rows or len(one.text)
        shape = (self.samples, *shape)
        self._tokens = family.tokens_of(shape)
        self._empty = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self._bound.hold(self._run, levels, context.steps or len(levels))

    def __call__(self, latents: Tensor, levels: Tensor, step: Tensor, reuse: bool) -> Tensor:
        """What the model says of latents, in the pipeline's layout."""
        level = levels.index_select(0, step)
        raw = self._bound(self._arguments(latents.to(self._dtype), level), step, reuse=reuse)
        if (sound := self._family.read_sound(raw)) is not None:
            if self.sound is None:  # only now, as a residual
                self.sound = torch.empty_like(sound)
            self.sound.copy_(sound)
        return self._family.read_output(raw)[:, : self._tokens]

    def begin(self, latents: Tensor, levels: Tensor, step: Tensor) -> None:
        """Runs the first block."""
        level = levels.index_select(0, step)
        self._bound.begin(self._arguments(latents.to(self._dtype), level), step)

    def _arguments(self, latents: Tensor, level: Tensor) -> dict[str, Any]:
        """Of the forward. Sliced only now: a captured run's tensors change places."""
        whole = self._family.unbatched
        prompt = {
            name: value[: self._rows] if isinstance(value, Tensor) and name not in whole else value
            for name, value in self._conditioning.items()
        }
        return self._family.forward_arguments(latents, level, prompt)

    def _run(self, level: Tensor) -> Any:
        return self._bound.run(self._arguments(self._empty, level))

    def refresh(self, step: int, level: Tensor, conditioning: Mapping[str, Any]) -> None:
        """Writes other tensors of the prompt, and a step's time, in place."""
        for name, tensor in self._conditioning.items():
            if isinstance(tensor, Tensor):
                tensor.copy_(conditioning[name])
        self._bound.hold_again(self._run, level, step)

    @property
    def residual(self) -> Residual | None:
        """What the blocks added when they last ran; None where steps do not reuse."""
        return self._bound.residual

    def tensors(self) -> tuple[Tensor, ...]:
        """As `Bucket.tensors`."""
        kept = () if self.residual is None else self.residual.tensors()
        return (*self._bound.tensors(), *kept)
