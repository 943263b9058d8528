"""Cutting latents into tokens and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ddit_rt.errors import ShapeError
from ddit_rt.ops._checks import FLOATING, check_dtype, check_patch_size


def pack(latents: Tensor, patch_size: int) -> Tensor:
    """Cuts latents into square patches, one token each.

    Tokens are ordered by frame, row and column of patches; features by channel, row and column
    inside the patch. At `patch_size=2` this is `FluxPipeline._pack_latents` of diffusers. A video's
    frames are not merged: patches are spatial. Differentiable.

    Args:
        latents: `[B, C, H, W]` or `[B, C, F, H, W]`, float32, bfloat16 or float16.
        patch_size: Edge `p` of a patch in latent pixels; divides H and W.

    Returns:
        Tokens `[B, F * (H / p) * (W / p), C * p * p]`, of the latents' dtype.

    Raises:
        ShapeError: Not four or five dimensions, or a size that p does not divide.
        ValueError: Another dtype.
    """
    if latents.dim() not in (4, 5):
        raise ShapeError(
            f"latents have shape {tuple(latents.shape)}, expected [B, C, H, W] or [B, C, F, H, W]"
        )
    check_dtype(latents, FLOATING, "latents")
    check_patch_size(patch_size, latents.shape[-2], latents.shape[-1])
    tokens: Tensor = torch.ops.ddit_rt.pack(latents.contiguous(), patch_size)
    return tokens


def unpack(tokens: Tensor, patch_size: int, height: int, width: int, frames: int = 0) -> Tensor:
    """Puts tokens back into latents: the inverse of `pack`. Differentiable.

    Args:
        tokens: `[B, N, C * p * p]`, float32, bfloat16 or float16.
        patch_size: Edge `p` of a patch in latent pixels; divides height and width.
        height: Of the latents, in latent pixels.
        width: Of the latents, in latent pixels.
        frames: Latent frames of a video; 0 for an image, whose latents have no such dimension.

    Returns:
        Latents `[B, C, height, width]`, or `[B, C, frames, height, width]` if `frames` is given.

    Raises:
        ShapeError: Tokens whose number or width does not fit the sizes.
        ValueError: Another dtype.
    """
    check_dtype(tokens, FLOATING, "tokens")
    if height < 1 or width < 1 or frames < 0:
        raise ShapeError(
            f"height {height}, width {width}, frames {frames}: expected positive sizes (frames=0 "
            "for an image)"
        )
    check_patch_size(patch_size, height, width)
    expected = max(frames, 1) * (height // patch_size) * (width // patch_size)
    if tokens.dim() != 3 or tokens.shape[1] != expected or tokens.shape[2] % patch_size**2:
        raise ShapeError(
            f"tokens have shape {tuple(tokens.shape)}, expected [B, {expected}, C * "
            f"{patch_size**2}] for latents of {height} x {width} with frames={frames}"
        )
    latents: Tensor = torch.ops.ddit_rt.unpack(
        tokens.contiguous(), patch_size, height, width, frames
    )
    return latents
