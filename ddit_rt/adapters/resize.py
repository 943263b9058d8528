"""Patch embeddings for larger patches, by the pseudo-inverse of the bilinear resize.

As FlexiViT (arXiv 2212.08013, section 3.4) does: with B the matrix that resizes a p x p patch
bilinearly to q x q, the new embedding of a resized patch must equal the old embedding of the
patch, w_new^T B x = w^T x for all x, of which w_new = pinv(B)^T w is the least-squares solution.
The de-embedding goes the other way, and the inverse of pinv(B) is B itself: the patch that the
base model would have written, resized bilinearly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bilinear_matrix(patch: int, new_patch: int) -> Tensor:
    """B: resizes a patch, row-major.

    Returns:
        `[new_patch**2, patch**2]`, float64.
    """
    units = torch.eye(patch * patch, dtype=torch.float64, device="cpu").reshape(-1, 1, patch, patch)
    resized = F.interpolate(
        units, size=(new_patch, new_patch), mode="bilinear", align_corners=False
    )
    return resized.reshape(patch * patch, new_patch * new_patch).T.contiguous()


def resize_embedding(weight: Tensor, patch: int, new_patch: int) -> Tensor:
    """Embedding weight for larger patches.

    Args:
        weight: `[d, C * patch**2]`, features in the order (c, dy, dx).
        patch: p.
        new_patch: q, a multiple of p.

    Returns:
        `[d, C * new_patch**2]`, in the dtype of `weight`.
    """
    pinv = torch.linalg.pinv(bilinear_matrix(patch, new_patch))
    per_channel = weight.detach().double().cpu().reshape(len(weight), -1, patch * patch)
    resized: Tensor = (per_channel @ pinv).flatten(1).to(weight)
    return resized


def resize_projection(tensor: Tensor, patch: int, new_patch: int) -> Tensor:
    """De-embedding weight or bias for larger patches.

    Args:
        tensor: `[C * patch**2, d]` or `[C * patch**2]`.
        patch: p.
        new_patch: q.

    Returns:
        `[C * new_patch**2, d]` or `[C * new_patch**2]`, in the dtype of `tensor`.
    """
    matrix = bilinear_matrix(patch, new_patch)
    per_channel = tensor.detach().double().cpu().reshape(-1, patch * patch, *tensor.shape[1:])
    resized = torch.einsum("qp,cp...->cq...", matrix, per_channel)
    return resized.flatten(0, 1).to(tensor)
