"""Clean channels beside the latents, made smaller for a coarse step: images and masks.

They carry no noise, so that plain means do, without the scale that belongs to noise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def smaller(picture: Tensor, size: tuple[int, ...]) -> Tensor:
    """Means of `[B, C, H, W]`, or of every frame of `[B, C, F, H, W]`, at a size of rows, columns.

    An image of one pixel, as examples have it, is repeated.
    """
    if picture.shape[-2:] == size:
        return picture
    return F.interpolate(picture, (*picture.shape[2:-2], *size), mode="area")


def smaller_mask(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """A mask whose channels are the pixels of a latent pixel, as most of it is: 0 or 1.

    Args:
        mask: `[B, s * s, H, W]` or `[B, s * s, F, H, W]`, for s x s pixels.
        size: Latent rows and columns to make of it.
    """
    side = math.isqrt(mask.shape[1])
    pixels = F.pixel_shuffle(mask.movedim(1, -3), side)
    pixels = smaller(pixels, (size[0] * side, size[1] * side))
    return F.pixel_unshuffle((pixels >= 0.5).to(mask.dtype), side).movedim(-3, 1)


def smaller_both(channels: Tensor, pictures: int, size: tuple[int, ...]) -> Tensor:
    """Channels of images, then those of a mask, at a size."""
    if channels.shape[-2:] == size:
        return channels
    picture, mask = channels.tensor_split([pictures], dim=1)
    return torch.cat((smaller(picture, size), smaller_mask(mask, size)), dim=1)
