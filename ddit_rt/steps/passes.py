"""The passes of the model in a step, between the embedding and the latents.

Without guidance there is one. Classifier-free guidance has two, with the prompt and with the
negative prompt, as one batch of two or one after the other, and joins what they say:

    v = v_negative + scale (v_prompt - v_negative)

The scale is a step's own. Both see one latent at one patch size, so they are joined as
tokens, before anything is enlarged or kept: a guided run keeps one clean estimate, not two, and
enlarges once. Only the residuals of a step cache are kept for every pass. In a step that is not
guided the cond pass runs by itself, on the same tables, and v is v_prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddit_rt import ops
from ddit_rt.models.base import Grid
from ddit_rt.steps.base import Blocks, RunContext, Runners, StepModel, at_step
from ddit_rt.steps.first_block import FirstBlock
from ddit_rt.steps.residual import Residual


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """One pass at one patch size."""

    blocks: Blocks
    text: Tensor
    temb: Tensor
    positions: tuple[Tensor, ...]


class Passes:
    """The passes of one patch size."""

    def __init__(
        self,
        model: StepModel,
        context: RunContext,
        grid: Grid,
        levels: Tensor,
        *,
        runners: Runners | None = None,
        stretch: int = 1,
        places: Tensor | None = None,
        first_blocks: Sequence[FirstBlock] = (),
    ) -> None:
        """Prepares what stays the same in every step.

        Args:
            model: The model.
            context: The run.
            grid: Its image tokens at this patch size.
            levels: t that the model is given at every step, `[M]`, float32, in [0, 1].
            runners: The blocks; by default the unmodified ones.
            stretch: Distance of neighbouring tokens, as `Family.positions` takes it.
            places: Which of the tokens run, `[n]`, int64, read at every step; by default all.
            first_blocks: Of every pass, where they run ahead of the others.
        """
        family, transformer = model.layers, model.transformer
        ahead: Sequence[FirstBlock | None] = first_blocks or [None] * len(context.passes)
        self._model = model
        self._frames = context.frames
        self._scales = context.scales
        self._places = places
        self._passes = tuple(
            _Prepared(
                blocks=Blocks(
                    model,
                    model.base if runners is None else runners,
                    Residual(context.residuals, context.sigmas, len(one.text))
                    if context.residuals
                    else None,
                    first_block,
                ),
                text=one.text,
                temb=family.embed_time(transformer, levels, one.conditioning),
                positions=family.positions(transformer, grid, one.text.shape[1], stretch=stretch),
            )
            for one, first_block in zip(context.passes, ahead, strict=True)
        )

    def __call__(
        self,
        hidden: Tensor,
        step: Tensor,
        project: Callable[[Tensor], Tensor] | None = None,
        *,
        reuse: bool = False,
        guided: bool = True,
    ) -> Tensor:
        """Embedded image tokens `[B, n, d]` to the output `[B, n, ...]`.

        Args:
            hidden: Image tokens.
            step: k, `[1]`.
            project: The de-embedding, of `[B, n, d]` or, of cond and uncond, `[2 B, n, d]`; by
                default the model's own.
            reuse: See `Bucket.velocity`.
            guided: See `Bucket.velocity`.
        """
        project = project or self._project
        if self._scales is None or not guided:
            return project(self._run(self._passes[0], hidden, step, reuse))
        if len(self._passes) == 1:
            both = torch.cat((hidden, hidden))
            prompt, negative = project(self._run(self._passes[0], both, step, reuse)).chunk(2)
        else:
            prompt, negative = (
                project(self._run(one, hidden, step, reuse)) for one in self._passes
            )
        # Without dimensions, the scale leaves the velocities' dtype as it is, as in diffusers.
        return negative + at_step(self._scales, step) * (prompt - negative)

    def velocity(
        self, latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = True
    ) -> Tensor:
        """Velocity of latents `[B, ...]` of this size; see `Bucket.velocity`."""
        tokens = self(self._embed(latents), step, reuse=reuse, guided=guided)
        height, width = latents.shape[-2:]
        return self._model.unpack(tokens, height, width, self._frames)

    def begin(self, latents: Tensor, step: Tensor) -> None:
        """Runs the first block of every pass."""
        hidden = self._embed(latents)
        for one in self._passes:
            copies = len(one.text) // len(hidden)
            one.blocks.begin(
                hidden.repeat(copies, 1, 1), one.text, at_step(one.temb, step), one.positions
            )

    def _embed(self, latents: Tensor) -> Tensor:
        model = self._model
        tokens = ops.pack(latents.to(model.dtype), model.patch_size)
        return model.layers.embed_tokens(model.transformer, tokens)

    def _run(self, one: _Prepared, hidden: Tensor, step: Tensor, reuse: bool) -> Tensor:
        """Image tokens through the blocks and the last modulation; of a pass's first rows."""
        rows = len(hidden)
        family, temb = self._model.layers, at_step(one.temb, step)[:rows]
        positions, text = one.positions, one.text[:rows]
        if self._places is not None:
            positions = family.positions_at(positions, self._places, text.shape[1])
        hidden = one.blocks(hidden, text, temb, positions, step, reuse=reuse)
        return family.modulate_output(self._model.transformer, hidden, temb)

    def _project(self, hidden: Tensor) -> Tensor:
        return self._model.layers.project_output(self._model.transformer, hidden)

    def refresh(self, step: int, level: Tensor, conditioning: Mapping[str, Tensor]) -> None:
        """Writes a step's inputs in place; see `Bucket.refresh`.

        Args:
            step: k.
            level: t that the model is given, `[1]`.
            conditioning: Conditioning of the only pass.
        """
        family, transformer = self._model.layers, self._model.transformer
        (one,) = self._passes
        one.text.copy_(family.embed_text(transformer, conditioning))
        one.temb[step].copy_(family.embed_time(transformer, level, conditioning)[0])

    def residuals(self) -> tuple[Tensor, ...]:
        """See `Bucket.residuals`."""
        return tuple(one.latest for one in self._kept())

    def sound(self) -> Tensor | None:
        """See `Bucket.sound`: a model that tells its layers has no soundtrack."""
        return None

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Bucket.tensors`."""
        tables = (tensor for one in self._passes for tensor in (one.temb, *one.positions))
        return (*tables, *(tensor for one in self._kept() for tensor in one.tensors()))

    def _kept(self) -> list[Residual]:
        return [one.blocks.residual for one in self._passes if one.blocks.residual is not None]
