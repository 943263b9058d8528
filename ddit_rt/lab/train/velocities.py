"""States of denoising runs, and velocities there: the teacher's, and the coarse ones.

The formulas are those of the buckets (`ddit_rt/steps`, `ddit_rt/adapters`), but differentiable
and with a noise level and a past of its own for every sample of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddit_rt import ops
from ddit_rt.adapters import (
    PatchAdapter,
    embed_adapted,
    pack_padded,
    snr_tokens,
    unpack_cut,
)
from ddit_rt.steps import Blocks, Resampling, Runners, StepModel, matched_level, token_velocity
from ddit_rt.torch_state import without_autocast


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """What came before a state: a step at p, and the first coarse step after it.

    Attributes:
        used: Whether a sample has such a past, `[B]`, bool.
        latents: z at the step at p, `[B, C, H, W]`.
        sigmas: Noise level of that step, `[B]`.
        velocity: The teacher's velocity there; None: it is asked, and `first_latents` and the
            state itself lie where it leads, as in a run whose clean estimate stays the same.
        first_latents: z at the first coarse step, `[B, C, H, W]`; None where `velocity` is.
        first_sigmas: Noise level of that coarse step, `[B]`.
    """

    used: Tensor
    latents: Tensor
    sigmas: Tensor
    velocity: Tensor | None
    first_latents: Tensor | None
    first_sigmas: Tensor


@dataclass(frozen=True, kw_only=True)
class States:
    """A batch of states of denoising runs.

    Attributes:
        latents: z, `[B, C, H, W]`, float32.
        sigmas: Noise level t of each sample, `[B]`, float32.
        velocity: The teacher's velocity, `[B, C, H, W]`, float32; None: it is asked.
        conditioning: Conditioning tensors, as the family takes them.
        earlier: The past; None: no sample has any.
    """

    latents: Tensor
    sigmas: Tensor
    velocity: Tensor | None
    conditioning: Mapping[str, Tensor]
    earlier: Earlier | None


@torch.no_grad()
def taught(model: StepModel, states: States) -> States:
    """The same states with the teacher's velocity wherever it is missing."""
    states = _led_on(model, states)
    if states.velocity is not None:
        return states
    velocity = teacher(model, states.latents, states.sigmas, states.conditioning)
    return replace(states, velocity=velocity)


def _led_on(model: StepModel, states: States) -> States:
    """Asks the teacher at the earlier steps, and takes the states after them from there.

    States on the straight line from noise to an image will not do: from one to the next they
    reveal more of the image, which a run, whose next state follows from this one, does not.
    """
    earlier = states.earlier
    if earlier is None or earlier.velocity is not None:
        return states
    rows = earlier.used.nonzero()[:, 0]  # the others are never looked at
    velocity = torch.zeros_like(earlier.latents)
    if len(rows):
        conditioning = {name: value[rows] for name, value in states.conditioning.items()}
        velocity[rows] = teacher(model, earlier.latents[rows], earlier.sigmas[rows], conditioning)
    away, first_away = states.sigmas - earlier.sigmas, earlier.first_sigmas - earlier.sigmas
    later = earlier.latents + _column(away) * velocity
    latents = torch.where(_column(earlier.used), later, states.latents)
    first = earlier.latents + _column(first_away) * velocity
    earlier = replace(earlier, velocity=velocity, first_latents=first)
    return replace(states, latents=latents, earlier=earlier)


@torch.no_grad()
def teacher(
    model: StepModel, latents: Tensor, sigmas: Tensor, conditioning: Mapping[str, Tensor]
) -> Tensor:
    """The unmodified model at p: `[B, C, H, W]`, float32."""
    family, transformer = model.layers, model.transformer
    height, width = latents.shape[-2:]
    text = family.embed_text(transformer, conditioning)
    grid = model.grid(height, width)
    positions = family.positions(transformer, grid, text.shape[1])
    tokens = ops.pack(latents.to(model.dtype), model.patch_size)
    hidden = family.embed_tokens(transformer, tokens)
    temb = _embed_time(model, sigmas, conditioning)
    tokens = token_velocity(model, hidden, text, temb, positions)
    return ops.unpack(tokens, model.patch_size, height, width).float()


def coarse_velocity(
    model: StepModel, states: States, multiple: int, adapter: PatchAdapter | None, runners: Runners
) -> Tensor:
    """A coarse velocity, as the buckets compute it, with a level of its own for each sample.

    Args:
        model: The frozen model.
        states: The states, with the teacher's velocity where there is a past.
        multiple: s.
        adapter: An adapter of either variant; None for the training-free step.
        runners: The blocks.

    Returns:
        `[B, C, H, W]`, float32.
    """
    if adapter is not None and adapter.config.variant == "paper":
        return _paper(model, states, multiple, adapter, runners)
    height, width = states.latents.shape[-2:]
    maps = Resampling.of(model, (height, width), multiple)
    return _snr(_Coarse(model, multiple, adapter, runners, maps), states)


def _embed_time(model: StepModel, levels: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    """`[B]` to `[B, d]`: the family pairs every level with every sample, one each is wanted."""
    temb = model.layers.embed_time(model.transformer, levels, conditioning)
    return temb.diagonal(dim1=0, dim2=1).T


def _paper(
    model: StepModel, states: States, multiple: int, adapter: PatchAdapter, runners: Runners
) -> Tensor:
    family, transformer = model.layers, model.transformer
    height, width = states.latents.shape[-2:]
    patch, grid = model.patch_size * multiple, model.grid(height, width, multiple)
    text = family.embed_text(transformer, states.conditioning)
    positions = family.positions(transformer, grid, text.shape[1], stretch=multiple)
    temb = _embed_time(model, states.sigmas, states.conditioning)
    tokens = pack_padded(states.latents.to(model.dtype), patch)
    hidden = embed_adapted(model, adapter, tokens, None)
    hidden = Blocks(model, runners)(hidden, text, temb, positions)
    hidden = family.modulate_output(transformer, hidden, temb)
    velocity = adapter.project_tokens(hidden, tokens)
    return unpack_cut(velocity, patch, height, width).float()


@dataclass(frozen=True)
class _Coarse:
    """A way to take a patch size through a small image."""

    model: StepModel
    multiple: int
    adapter: PatchAdapter | None
    runners: Runners
    maps: Resampling

    @without_autocast()
    def down(self, latents: Tensor) -> Tensor:
        """Reduces in full precision, as the runtime does, which is shielded from autocast."""
        return self.maps.down(latents)

    @without_autocast()
    def up(self, small: Tensor) -> Tensor:
        """Enlarges in full precision."""
        return self.maps.up(small)

    def small(
        self, latents: Tensor, sigmas: Tensor, known: Tensor, conditioning: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Clean estimate of the small image, and the adapter's correction of v."""
        model, family, transformer = self.model, self.model.layers, self.model.transformer
        height, width = latents.shape[-2:]
        text = family.embed_text(transformer, conditioning)
        grid = model.grid(height, width, self.multiple)
        positions = family.positions(transformer, grid, text.shape[1])
        scale, level = matched_level(sigmas, self.maps.deviation)
        low = self.down(latents) * _column(scale)
        tokens = ops.pack(low.to(model.dtype), model.patch_size)
        temb = _embed_time(model, level, conditioning)
        if self.adapter is None:
            hidden = family.embed_tokens(transformer, tokens)
            own = token_velocity(model, hidden, text, temb, positions)
            correction = torch.zeros_like(latents)
        else:
            patch = model.patch_size * self.multiple
            seen = snr_tokens(latents, known, patch, model.dtype)
            hidden = embed_adapted(model, self.adapter, seen, tokens)
            hidden = Blocks(model, self.runners)(hidden, text, temb, positions)
            hidden = family.modulate_output(transformer, hidden, temb)
            own = family.project_output(transformer, hidden)
            written = self.adapter.project_tokens(hidden, seen)
            correction = unpack_cut(written, patch, height, width).float()
        velocity = ops.unpack(own, model.patch_size, *low.shape[-2:]).float()
        return low - _column(level) * velocity, correction


def _snr(coarse: _Coarse, states: States) -> Tensor:
    """The velocity that `SnrBucket` and `SnrAdapterBucket` compute."""
    sigmas, earlier = _column(states.sigmas), states.earlier
    known = torch.zeros_like(states.latents) if earlier is None else _clean_estimate(earlier)
    low, correction = coarse.small(states.latents, states.sigmas, known, states.conditioning)
    change = low - coarse.down(known)
    if earlier is not None:
        change = change - _disagreement(coarse, states, earlier, known)
        # At the first coarse step the two cancel, whatever the model says: no gradient there.
        is_first = earlier.used & (states.sigmas == earlier.first_sigmas)
        change = torch.where(_column(is_first), torch.zeros_like(change), change)
    clean = known + coarse.up(change)
    return (states.latents - clean) / sigmas + correction


@torch.no_grad()
def _disagreement(coarse: _Coarse, states: States, earlier: Earlier, known: Tensor) -> Tensor:
    """The faded e of `SnrBucket`; zero where there is no past, or where it cancels anyway."""
    faded = torch.zeros_like(coarse.down(known))
    rows = (earlier.used & (states.sigmas != earlier.first_sigmas)).nonzero()[:, 0]
    if len(rows):
        known, sigmas = known[rows], earlier.first_sigmas[rows]
        conditioning = {name: value[rows] for name, value in states.conditioning.items()}
        assert earlier.first_latents is not None, "known with the velocity"
        first, _ = coarse.small(earlier.first_latents[rows], sigmas, known, conditioning)
        fade = _column(states.sigmas[rows] / sigmas).square()
        faded[rows] = (first - coarse.down(known)) * fade
    return faded


def squared_error(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean over all but the batch: `[B]`."""
    return (velocity - target).square().flatten(1).mean(1)


def _clean_estimate(earlier: Earlier) -> Tensor:
    """x0 = z - t v of the step at p; zero for a sample without one."""
    assert earlier.velocity is not None, "the teacher was asked"
    clean = earlier.latents - _column(earlier.sigmas) * earlier.velocity
    return clean * _column(earlier.used)


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]
