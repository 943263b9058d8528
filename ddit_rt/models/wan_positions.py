"""Rotary positions of Wan: frames, rows and columns, of patches of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddit_rt.errors import ShapeError
from ddit_rt.models.base import Grid

_ROPE_THETA = 10000.0


def rotary_tables(rope: Any, grid: Grid, stretch: int) -> tuple[Tensor, ...]:
    """Cos and sin, each `[1, n, 1, head width]`, float32.

    Args:
        rope: The model's `WanRotaryPosEmbed`.
        grid: Image tokens.
        stretch: Distance of neighbouring tokens of a frame, as `Family.positions` takes it.

    Raises:
        ShapeError: More tokens in a direction than the model has positions for.
    """
    longest = max(grid.frames, grid.height, grid.width)
    if longest > rope.max_seq_len:
        raise ShapeError(
            f"got {grid.frames} x {grid.height} x {grid.width} tokens; this model has "
            f"positions for at most {rope.max_seq_len} in each direction"
        )
    axes = [
        _axis_table(rope, axis, count, 1 if axis == 0 else stretch)
        for axis, count in enumerate((grid.frames, grid.height, grid.width))
    ]
    shape = (grid.frames, grid.height, grid.width)
    return tuple(_join_axes([axis[part] for axis in axes], shape) for part in (0, 1))


def _axis_table(rope: Any, axis: int, count: int, stretch: int) -> tuple[Tensor, Tensor]:
    """Rotary cos and sin of one direction, each `[count, part of the head width]`."""
    widths = [rope.t_dim, rope.h_dim, rope.w_dim]
    if stretch == 1:
        tables = (rope.freqs_cos, rope.freqs_sin)
        cos, sin = (table[:count].split(widths, dim=1)[axis].float() for table in tables)
        return cos, sin
    # Imported here: it pulls in much of diffusers.
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    places = torch.arange(count, dtype=torch.float64, device=rope.freqs_cos.device)
    cos, sin = get_1d_rotary_pos_embed(
        widths[axis],
        places * stretch + (stretch - 1) / 2,
        _ROPE_THETA,
        use_real=True,
        repeat_interleave_real=True,
        freqs_dtype=torch.float64,
    )
    return cos, sin


def _join_axes(parts: Sequence[Tensor], shape: tuple[int, int, int]) -> Tensor:
    """Tables of frames, rows and columns as one of all tokens, `[1, n, 1, head width]`."""
    views = [(-1, 1, 1), (1, -1, 1), (1, 1, -1)]
    spread = [
        part.view(*view, part.shape[1]).expand(*shape, -1)
        for part, view in zip(parts, views, strict=True)
    ]
    return torch.cat(spread, dim=-1).reshape(1, -1, 1, sum(part.shape[1] for part in parts))
