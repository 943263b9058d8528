"""FLUX over tokens of two sizes: its own layers, and the regions of latents that tokens cover.

diffusers' `FluxTransformer2DModel` takes one noise level for all tokens. Here are its own layers,
in the order of its own forward, with a modulation for each part of the tokens; with a single part
they compute what that forward does, which a test holds them to.

A region is the square of latent pixels that one coarse token covers: m x m tokens at p. What is
computed of regions is computed of tensors alone, in shapes that depend on the size of the latent
and the share of regions, as a captured graph would need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddit_rt import ops
from ddit_rt.models.base import Grid
from ddit_rt.models.flux import FluxFamily
from ddit_rt.models.flux_blocks import DOUBLE_CHUNKS, SINGLE_CHUNKS
from ddit_rt.steps import Resampling

FAMILY = FluxFamily()
PATCH = FAMILY.patch
"""p, in latent pixels."""

Rotary = tuple[Tensor, Tensor]
"""Cos and sin, `[tokens, head width]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Neighbouring tokens of a list at one noise level.

    Attributes:
        count: Tokens.
        rows: Their modulation, `[P, m]`, as `FluxFamily.embed_time` makes it for P passes.
    """

    count: int
    rows: Tensor


def token_velocity(
    transformer: Any, tokens: Tensor, text: Tensor, parts: Sequence[Part], rotary: Rotary
) -> Tensor:
    """The model's velocity of every token.

    Args:
        transformer: A `FluxTransformer2DModel`.
        tokens: `[P, n, C p p]`, part by part.
        text: Embedded text, `[P, T, d]`; modulated as the first part is.
        parts: Whose counts add up to n.
        rotary: Of text, then tokens, `[T + n, head width]`.

    Returns:
        `[P, n, C p p]`.
    """
    doubles, singles = transformer.transformer_blocks, transformer.single_transformer_blocks
    width, length = transformer.inner_dim, text.shape[1]
    chunks = [1, *[DOUBLE_CHUNKS] * len(doubles), *[SINGLE_CHUNKS] * len(singles)]
    split = [
        part.rows.unsqueeze(1).split_with_sizes([width * n for n in chunks], dim=-1)
        for part in parts
    ]
    times, *blocks = zip(*split, strict=True)
    counts = [part.count for part in parts]
    hidden = transformer.x_embedder(tokens)
    for block, rows in zip(doubles, blocks, strict=False):
        text, hidden = _double(block, hidden, text, rows, counts, rotary)
    joint = torch.cat((text, hidden), dim=1)
    joint_counts = [length + counts[0], *counts[1:]]
    for block, rows in zip(singles, blocks[len(doubles) :], strict=True):
        joint = _single(block, joint, rows, joint_counts, rotary)
    pieces = joint[:, length:].split_with_sizes(counts, dim=1)
    normed = [
        transformer.norm_out(piece, time.squeeze(1))
        for piece, time in zip(pieces, times, strict=True)
    ]
    velocity: Tensor = transformer.proj_out(_joined(normed))
    return velocity


def _double(
    block: Any,
    hidden: Tensor,
    text: Tensor,
    rows: Sequence[Tensor],
    counts: Sequence[int],
    rotary: Rotary,
) -> tuple[Tensor, Tensor]:
    halves = [row.chunk(2, dim=-1) for row in rows]
    image = list(zip(*(half[0].chunk(6, dim=-1) for half in halves), strict=True))
    of_text = [(value,) for value in halves[0][1].chunk(6, dim=-1)]
    alone = [text.shape[1]]
    attended, attended_text = block.attn(
        hidden_states=_modulated(block.norm1.norm(hidden), image[0], image[1], counts),
        encoder_hidden_states=_modulated(
            block.norm1_context.norm(text), of_text[0], of_text[1], alone
        ),
        image_rotary_emb=rotary,
    )
    hidden = hidden + _gated(attended, image[2], counts)
    text = text + _gated(attended_text, of_text[2], alone)
    wide = block.ff(_modulated(block.norm2(hidden), image[3], image[4], counts))
    wide_text = block.ff_context(
        _modulated(block.norm2_context(text), of_text[3], of_text[4], alone)
    )
    return text + _gated(wide_text, of_text[5], alone), hidden + _gated(wide, image[5], counts)


def _single(
    block: Any, joint: Tensor, rows: Sequence[Tensor], counts: Sequence[int], rotary: Rotary
) -> Tensor:
    shift, scale, gate = zip(*(row.chunk(3, dim=-1) for row in rows), strict=True)
    normed = _modulated(block.norm.norm(joint), shift, scale, counts)
    attended = block.attn(hidden_states=normed, image_rotary_emb=rotary)
    wide = block.act_mlp(block.proj_mlp(normed))
    return joint + _gated(block.proj_out(torch.cat([attended, wide], dim=2)), gate, counts)


def _modulated(
    tokens: Tensor, shifts: Sequence[Tensor], scales: Sequence[Tensor], counts: Sequence[int]
) -> Tensor:
    pieces = zip(tokens.split_with_sizes(list(counts), dim=1), shifts, scales, strict=True)
    return _joined([piece * (1 + scale) + shift for piece, shift, scale in pieces])


def _gated(tokens: Tensor, gates: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    pieces = zip(tokens.split_with_sizes(list(counts), dim=1), gates, strict=True)
    return _joined([gate * piece for piece, gate in pieces])


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=1)


def pack(latents: Tensor) -> Tensor:
    """`[1, C, H, W]` to tokens at p, `[n, C p p]`."""
    return ops.pack(latents, PATCH)[0]


class Regions:
    """The regions of latents of one size at one multiple m of p.

    Attributes:
        multiple: m.
        count: How many there are, R.
        tokens: Tokens at p of each, row by row, `[R, m m]`.
        maps: Between latents and their small image.
    """

    def __init__(self, transformer: Any, size: tuple[int, int], multiple: int) -> None:
        """Of latents of `size`, rows and columns, which m times p has to divide."""
        edge = PATCH * multiple
        if size[0] % edge or size[1] % edge:
            raise ValueError(f"got latents of {size}; patches of {edge} have to divide both sides")
        self._transformer = transformer
        self.size, self.multiple = size, multiple
        self.rows, self.columns = size[0] // edge, size[1] // edge
        self.count = self.rows * self.columns
        places = torch.arange(self.count * multiple**2).reshape(1, 1, size[0] // PATCH, -1)
        self.tokens = ops.pack(places.float(), multiple)[0].long()
        self.maps = Resampling(
            size, (size[0] // multiple, size[1] // multiple), torch.device("cpu")
        )

    @cached_property
    def small(self) -> Rotary:
        """Positions of a real small image's tokens."""
        return self._positions(stretch=1)

    @cached_property
    def centres(self) -> Rotary:
        """Positions of the middle of each region, among tokens at p."""
        return self._positions(stretch=self.multiple)

    def _positions(self, stretch: int) -> Rotary:
        grid = Grid(height=self.rows, width=self.columns)
        cos, sin = FAMILY.positions(self._transformer, grid, 0, stretch=stretch)
        return cos, sin

    def unpack_small(self, tokens: Tensor) -> Tensor:
        """Coarse tokens `[R, C p p]` to the small image."""
        height, width = self.maps.small
        return ops.unpack(tokens[None], PATCH, height, width)

    def unpack(self, tokens: Tensor) -> Tensor:
        """Tokens at p `[n, C p p]` to latents."""
        return ops.unpack(tokens[None], PATCH, *self.size)

    def averaged(self, latents: Tensor) -> Tensor:
        """Means over m x m latent pixels, as coarse tokens `[R, C p p]`."""
        return pack(F.avg_pool2d(latents, self.multiple))

    def of(self, latents: Tensor) -> Tensor:
        """Every region's values, `[R, C (m p)^2]`."""
        return ops.pack(latents, PATCH * self.multiple)[0]

    def spread(self, changes: Tensor, anchor: tuple[int, int]) -> Tensor:
        """A token's change in each region, drawn out linearly to all tokens.

        Args:
            changes: `[R, C p p]`.
            anchor: Row and column of that token in its region.

        Returns:
            `[n, C p p]`; beyond the outermost tokens as they are.
        """
        rows, columns = (
            _linear(count, self.multiple, place)
            for count, place in zip((self.rows, self.columns), anchor, strict=True)
        )
        grid = changes.reshape(self.rows, self.columns, -1)
        return torch.einsum("ar,bc,rcf->abf", rows, columns, grid).flatten(0, 1)


def _linear(count: int, multiple: int, place: int) -> Tensor:
    """Linear interpolation from places `r m + place` to all `count m`: `[count m, count]`."""
    at = ((torch.arange(count * multiple) - place) / multiple).clamp(0, count - 1)
    return (1 - (at[:, None] - torch.arange(count)).abs()).clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """A prompt, ready for the model.

    Attributes:
        text: Embedded text, `[P, T, d]`; of P = 2 passes that of guidance comes second.
        pooled: `[P, e]`.
        guidance: Scale by which the two passes are joined.
    """

    text: Tensor
    pooled: Tensor
    guidance: float = 1.0


@dataclass(kw_only=True)
class Subject:
    """A model at one size.

    Attributes:
        transformer: A `FluxTransformer2DModel` on the CPU.
        size: Rows and columns of the latents.
    """

    transformer: Any
    size: tuple[int, int]
    _regions: dict[int, Regions] = field(default_factory=dict)

    @cached_property
    def positions(self) -> Rotary:
        """Of all tokens at p."""
        grid = Grid(height=self.size[0] // PATCH, width=self.size[1] // PATCH)
        cos, sin = FAMILY.positions(self.transformer, grid, 0)
        return cos, sin

    def regions(self, multiple: int) -> Regions:
        """The regions at a multiple of p."""
        if multiple not in self._regions:
            self._regions[multiple] = Regions(self.transformer, self.size, multiple)
        return self._regions[multiple]


def deviations(regions: Regions, latents: Sequence[Tensor]) -> Tensor:
    """Spread of the third difference, of which `ops.patch_scores` takes a quantile: `[R]`.

    Of a lower one where there are fewer than four latents, newest first; at least two.
    """
    difference = torch.stack(list(latents)).flip(0).diff(n=len(latents) - 1, dim=0)[0]
    return regions.of(difference).std(-1)


def detail_energy(regions: Regions, estimate: Tensor) -> Tensor:
    """What of the clean estimate the small image cannot hold: `[R]`."""
    maps = regions.maps
    return regions.of(estimate - maps.up(maps.down(estimate))).square().mean(-1)


def estimate_change(regions: Regions, now: Tensor, before: Tensor) -> Tensor:
    """How far the clean estimate moved in the step before: `[R]`."""
    return regions.of(now - before).square().mean(-1)
