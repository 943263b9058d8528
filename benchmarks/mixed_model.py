"""FLUX over image tokens that sit anywhere, in parts that are each at a noise level of their own.

diffusers' `FluxTransformer2DModel` takes one noise level for all tokens. Here are its own layers,
in the order of its own forward, with a modulation for each part; with a single part it computes
what that forward does, which a test holds it to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddit_rt.models.flux_blocks import DOUBLE_CHUNKS, SINGLE_CHUNKS

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
