"""Coarse buckets that run a trained adapter; `adapter.py` has the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from ddit_rt import ops
from ddit_rt.adapters.adapter import PatchAdapter
from ddit_rt.buckets import Blocks, Bucket, RunContext, Runners, SnrBucket, StepModel, at_step


def adapter_bucket(
    model: StepModel, context: RunContext, adapter: PatchAdapter, runners: Runners
) -> Bucket:
    """The bucket of an adapter's variant."""
    kind = AdapterBucket if adapter.config.variant == "paper" else SnrAdapterBucket
    return kind(model, context, adapter, runners)


def adapted_tokens(
    model: StepModel,
    adapter: PatchAdapter,
    blocks: Blocks,
    tokens: Tensor,
    small: Tensor | None,
    text: Tensor,
    temb: Tensor,
    positions: tuple[Tensor, ...],
    *,
    reuse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The blocks between an adapter's embedding and de-embedding.

    Args:
        model: The frozen model.
        adapter: The adapter.
        blocks: Blocks with its LoRA.
        tokens: Patches of s p x s p, `[B, n, C*q*q]`; twice as wide for `snr`.
        small: The small picture's own patches of p x p, `[B, n, C*p*p]`; None for `paper`.
        text: Text tokens, `[B, T, d]`.
        temb: Modulation input, `[B, d]`.
        positions: As the family makes them.
        reuse: See `Bucket.velocity`.

    Returns:
        The adapter's own output, `[B, n, C*q*q]`, and what went into the de-embedding, `[B, n, d]`.
    """
    family, transformer = model.family, model.transformer
    hidden = adapter.embed_tokens(tokens).to(model.dtype)
    if small is not None:
        hidden = family.embed_tokens(transformer, small) + hidden
    hidden = blocks(hidden, text, temb, positions, reuse=reuse)
    hidden = family.modulate_output(transformer, hidden, temb)
    return adapter.project_tokens(hidden, tokens), hidden


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
        self._blocks = Blocks(model, runners, keeps_residual=context.keeps_residual)
        self._patch = model.patch_size * multiple
        # RoPE has no table to interpolate: the centres of the larger patches, in units of base
        # tokens, are where a bilinear interpolation of the base grid's positions lands.
        self._positions = family.positions(
            transformer, grid, context.text.shape[1], stretch=multiple
        )
        self._temb = family.embed_time(transformer, context.timesteps, context.conditioning)

    def velocity(self, latents: Tensor, step: Tensor, *, reuse: bool = False) -> Tensor:
        """See `Bucket.velocity`."""
        model, context, temb = self._model, self._context, at_step(self._temb, step)
        tokens = ops.pack(latents.to(model.dtype), self._patch)
        velocity, _ = adapted_tokens(
            model,
            self._adapter,
            self._blocks,
            tokens,
            None,
            context.text,
            temb,
            self._positions,
            reuse=reuse,
        )
        return ops.unpack(velocity, self._patch, context.height, context.width)

    def residuals(self) -> tuple[Tensor, ...]:
        """See `Bucket.residuals`."""
        return (self._blocks.residual,)

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Bucket.tensors`."""
        return (self._temb, *self._positions)


class SnrAdapterBucket(SnrBucket):
    """The training-free step at s times p, corrected by an adapter of the variant `snr`."""

    def __init__(
        self, model: StepModel, context: RunContext, adapter: PatchAdapter, runners: Runners
    ) -> None:
        super().__init__(model, context, adapter.config.multiple)
        self._adapter = adapter
        self._blocks = Blocks(model, runners, keeps_residual=context.keeps_residual)
        self._patch = model.patch_size * self.multiple
        channels = model.family.latent_channels(model.transformer)
        shape = context.text.shape[0], channels, context.height, context.width
        # Without memory of a step at p nothing is known: zero, as before the first one.
        detail = context.detail
        self._known = torch.zeros(shape, device=model.device) if detail is None else detail.estimate

    def velocity(self, latents: Tensor, step: Tensor, *, reuse: bool = False) -> Tensor:
        """See `Bucket.velocity`."""
        model, context, low = self._model, self._context, self._reduce(latents, step)
        tokens = snr_tokens(latents, self._known, self._patch, model.dtype)
        small = ops.pack(low.to(model.dtype), model.patch_size)
        temb = at_step(self._temb, step)
        correction, hidden = adapted_tokens(
            model,
            self._adapter,
            self._blocks,
            tokens,
            small,
            context.text,
            temb,
            self._positions,
            reuse=reuse,
        )
        own = model.family.project_output(model.transformer, hidden)
        velocity = self._enlarge(latents, low, own, step)
        return velocity + ops.unpack(correction, self._patch, context.height, context.width)

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Bucket.tensors`."""
        return (*super().tensors(), self._known)


def snr_tokens(latents: Tensor, known: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """What an adapter of the variant `snr` embeds: patches of z and of what is known.

    Args:
        latents: z, `[B, C, H, W]`.
        known: Clean estimate of the latest step at p, or zeros, `[B, C, H, W]`.
        patch: s p, in latent pixels.
        dtype: Of the result.

    Returns:
        `[B, n, 2*C*q*q]`.
    """
    parts = (ops.pack(part.to(dtype), patch) for part in (latents, known))
    return torch.cat(tuple(parts), dim=-1)
