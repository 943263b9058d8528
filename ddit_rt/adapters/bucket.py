"""A coarse bucket that runs a trained adapter: the paper's own larger patch."""

from __future__ import annotations

from torch import Tensor

from ddit_rt import ops
from ddit_rt.adapters.adapter import PatchAdapter
from ddit_rt.buckets import RunContext, Runners, StepModel, at_step


class AdapterBucket:
    """v = model with adapter(z, t) on patches of s times p."""

    def __init__(
        self, model: StepModel, context: RunContext, adapter: PatchAdapter, runners: Runners
    ) -> None:
        multiple = adapter.config.multiple
        grid = model.grid(context.height, context.width, multiple)
        family, transformer = model.family, model.transformer
        self.multiple = multiple
        self.tokens = grid.tokens
        self._model = model
        self._context = context
        self._adapter = adapter
        self._runners = runners
        self._patch = model.patch_size * multiple
        # RoPE has no table to interpolate: the centres of the larger patches, in units of base
        # tokens, are where a bilinear interpolation of the base grid's positions lands.
        self._positions = family.positions(
            transformer, grid, context.text.shape[1], stretch=multiple
        )
        self._temb = family.embed_time(transformer, context.timesteps, context.conditioning)

    def velocity(self, latents: Tensor, step: Tensor) -> Tensor:
        """See `Bucket.velocity`."""
        model, context, temb = self._model, self._context, at_step(self._temb, step)
        tokens = ops.pack(latents.to(model.dtype), self._patch)
        hidden = self._adapter.embed_tokens(tokens)
        hidden = model.family.run_blocks(self._runners, hidden, context.text, temb, self._positions)
        hidden = model.family.modulate_output(model.transformer, hidden, temb)
        velocity = self._adapter.project_tokens(hidden, tokens)
        return ops.unpack(velocity, self._patch, context.height, context.width)

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Bucket.tensors`."""
        return (self._temb, *self._positions)
