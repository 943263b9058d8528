"""Latents that patches of an adapter do not divide: padded before, cut after.

An adapter's layers take whole patches, so the last row and column of them may reach over the far
edges. What lies there mirrors the latents. Zeros would be pixels without noise, which no level
that the model knows has, and a repeated edge would be streaks; mirrored pixels have the noise and
the content of their neighbourhood. (The demo's adapters are as good with zeros, as far as 16 images
can tell.) What comes back for them is cut off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddit_rt import ops


def pack_padded(latents: Tensor, patch: int) -> Tensor:
    """`ops.pack` of latents of any size: `[B, C, H, W]` to `[B, n, C*q*q]`, patches rounded up."""
    for axis in (-2, -1):
        latents = _mirrored(latents, axis, _padded(latents.shape[axis], patch))
    return ops.pack(latents, patch)


def unpack_cut(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of `pack_padded`, without what was padded: `[B, C, H, W]`."""
    latents = ops.unpack(tokens, patch, _padded(height, patch), _padded(width, patch))
    return latents[..., :height, :width]


def _padded(size: int, patch: int) -> int:
    return -(-size // patch) * patch


def _mirrored(latents: Tensor, axis: int, size: int) -> Tensor:
    # Again and again where less is there than is missing.
    while (missing := size - latents.shape[axis]) > 0:
        more = min(missing, latents.shape[axis])
        latents = torch.cat((latents, latents.flip(axis).narrow(axis, 0, more)), dim=axis)
    return latents
