"""Cutting latents into tokens and back."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(latents: Tensor, patch_size: int, *, channels_last: bool = False) -> Tensor:
    """Cuts each frame of the latents into patches of p x p pixels, one token each.

    Tokens are ordered by frame, row and column of patches. Features are ordered by channel, row and
    column inside the patch, as a patch embedding by convolution reads them; at `patch_size=2` this
    is `FluxPipeline._pack_latents` of diffusers. With `channels_last` they are ordered by row,
    column and channel, as the output of `WanTransformer3DModel` is. Differentiable.

    Args:
        latents: `[B, C, H, W]` or `[B, C, F, H, W]`, float32, bfloat16 or float16.
        patch_size: Edge `p` of a patch in latent pixels; divides H and W.
        channels_last: Whether a token holds a pixel's channels side by side.

    Returns:
        Tokens `[B, F * (H / p) * (W / p), C * p * p]`, of the latents' dtype.

    Raises:
        RuntimeError: Not four or five dimensions, a size that the patch does not divide, or another
            dtype.
    """
    tokens: Tensor = torch.ops.ddit_rt.pack(latents.contiguous(), patch_size, channels_last)
    return tokens


def unpack(
    tokens: Tensor,
    patch_size: int,
    height: int,
    width: int,
    frames: int = 0,
    *,
    channels_last: bool = False,
) -> Tensor:
    """Puts tokens back into latents: the inverse of `pack`. Differentiable.

    Args:
        tokens: `[B, N, C * p * p]`, float32, bfloat16 or float16.
        patch_size: Edge `p` of a patch in latent pixels; divides height and width.
        height: Rows of the latents, in latent pixels.
        width: Columns of the latents, in latent pixels.
        frames: Latent frames of a video; 0 for an image, whose latents have no such dimension.
        channels_last: Whether a token holds a pixel's channels side by side.

    Returns:
        Latents `[B, C, height, width]`, or `[B, C, frames, height, width]` if `frames` is given.

    Raises:
        RuntimeError: Tokens whose number or width does not fit the sizes, a size that the patch
            does not divide, or another dtype.
    """
    latents: Tensor = torch.ops.ddit_rt.unpack(
        tokens.contiguous(), patch_size, height, width, frames, channels_last
    )
    return latents
