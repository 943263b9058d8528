"""Coarse buckets that run a trained adapter; `adapter.py` has the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from ddit_rt import ops
from ddit_rt.adapters.adapter import PatchAdapter
from ddit_rt.adapters.padding import pack_padded, unpack_cut
from ddit_rt.steps import (
    Bucket,
    Passes,
    PassesBucket,
    RunContext,
    Runners,
    SnrBucket,
    StepInputs,
    StepModel,
)


def adapter_bucket(
    model: StepModel, context: RunContext, adapter: PatchAdapter, runners: Runners
) -> Bucket:
    """The bucket of an adapter's variant."""
    kind = AdapterBucket if adapter.config.variant == "paper" else SnrAdapterBucket
    return kind(model, context, adapter, runners)


def embed_adapted(
    model: StepModel, adapter: PatchAdapter, tokens: Tensor, small: Tensor | None
) -> Tensor:
    """Patches through an adapter's embedding, `[B, n, d]`.

    Args:
        model: The frozen model.
        adapter: The adapter.
        tokens: Patches of s p x s p, `[B, n, C*q*q]`; twice as wide for `snr`.
        small: The small image's own patches of p x p, `[B, n, C*p*p]`; None for `paper`.
    """
    hidden = adapter.embed_tokens(tokens).to(model.dtype)
    if small is None:
        return hidden
    return model.layers.embed_tokens(model.transformer, small) + hidden


class AdapterBucket(PassesBucket):
    """v = model with adapter(z, t) on patches of s times p."""

    _passes: Passes

    def __init__(
        self, model: StepModel, context: RunContext, adapter: PatchAdapter, runners: Runners
    ) -> None:
        self.multiple = adapter.config.multiple
        grid = model.grid(context.height, context.width, self.multiple)
        self.tokens = grid.tokens
        self._model = model
        self._context = context
        self._adapter = adapter
        self._patch = model.patch_size * self.multiple
        # RoPE has no table to interpolate: the centres of the larger patches, in units of base
        # tokens, are where a bilinear interpolation of the base grid's positions lands.
        self._passes = Passes(
            model, context, grid, context.timesteps, runners=runners, stretch=self.multiple
        )

    def velocity(
        self, latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = True
    ) -> Tensor:
        """See `Bucket.velocity`."""
        model, context, adapter = self._model, self._context, self._adapter
        tokens = pack_padded(latents.to(model.dtype), self._patch)

        def project(hidden: Tensor) -> Tensor:
            return adapter.project_tokens(hidden, _for_all(tokens, hidden))

        hidden = embed_adapted(model, adapter, tokens, None)
        velocity = self._passes(hidden, step, project, reuse=reuse, guided=guided)
        return unpack_cut(velocity, self._patch, context.height, context.width)

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Bucket.tensors`."""
        return self._passes.tensors()

    def state(self) -> tuple[Tensor, ...]:
        """See `Bucket.state`."""
        return ()

    def refresh(self, step: int, now: StepInputs) -> None:
        """See `Bucket.refresh`."""
        self._passes.refresh(step, now.timestep, now.conditioning)


class SnrAdapterBucket(SnrBucket):
    """The training-free step at s times p, corrected by an adapter of the variant `snr`."""

    def __init__(
        self, model: StepModel, context: RunContext, adapter: PatchAdapter, runners: Runners
    ) -> None:
        super().__init__(model, context, adapter.config.multiple, runners)
        self._adapter = adapter
        self._patch = model.patch_size * self.multiple

    def velocity(
        self, latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = True
    ) -> Tensor:
        """See `Bucket.velocity`."""
        model, context, adapter = self._model, self._context, self._adapter
        low, detail = self._reduce(latents, step), context.detail
        # Without memory of a step at p nothing is known: zero, as before the first one.
        known = torch.zeros_like(latents) if detail is None else detail.estimate
        tokens = snr_tokens(latents, known, self._patch, model.dtype)
        small = ops.pack(low.to(model.dtype), model.patch_size)

        def project(hidden: Tensor) -> Tensor:
            own = model.layers.project_output(model.transformer, hidden)
            correction = adapter.project_tokens(hidden, _for_all(tokens, hidden))
            # Side by side, so that guidance joins both at once.
            return torch.cat((own, correction), dim=-1)

        hidden = embed_adapted(model, adapter, tokens, small)
        assert isinstance(self._passes, Passes), "an adapter's model tells its layers"
        both = self._passes(hidden, step, project, reuse=reuse, guided=guided)
        own, correction = both[..., : small.shape[-1]], both[..., small.shape[-1] :]
        height, width = low.shape[-2:]
        low_velocity = model.unpack(own.contiguous(), height, width, context.frames)
        velocity = self._enlarge(latents, low, low_velocity, step)
        cut = unpack_cut(correction.contiguous(), self._patch, context.height, context.width)
        return velocity + cut


def _for_all(tokens: Tensor, hidden: Tensor) -> Tensor:
    """Tokens `[B, n, c]` once for each of cond and uncond that is in `hidden`."""
    return tokens.repeat(len(hidden) // len(tokens), 1, 1)


def snr_tokens(latents: Tensor, known: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """What an adapter of the variant `snr` embeds: patches of z and of what is known.

    Args:
        latents: z, `[B, C, H, W]`.
        known: Clean estimate of the latest step at p, or zeros, `[B, C, H, W]`.
        patch: s p, in latent pixels.
        dtype: Dtype of the result.

    Returns:
        `[B, n, 2*C*q*q]`.
    """
    parts = (pack_padded(part.to(dtype), patch) for part in (latents, known))
    return torch.cat(tuple(parts), dim=-1)
