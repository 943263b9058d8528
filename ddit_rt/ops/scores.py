"""How fast the latents change, per candidate patch size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def patch_scores(
    history: Tensor,
    patch_sizes: Sequence[int],
    quantile: float,
    order: int = 3,
    head: int = 0,
) -> Tensor:
    """Scores candidate patch sizes by the spread of a finite difference of the latents.

    With z0 the newest latent, the difference of order 1, 2 or 3 is `z0 - z1`, `z0 - 2 z1 + z2` or
    `z0 - 3 z1 + 3 z2 - z3`. It is cut into `p x p` patches (all channels, one frame); the score of
    size p is the quantile over a sample's patches of their standard deviations (`ddof=1`, as
    `torch.std`), interpolated as `torch.quantile` does. Deterministic, in float32, for any number
    of threads. All sizes come from one pass over the history. Source: DDiT, arXiv 2602.16968,
    section 3.2, which uses order 3 and quantile 0.4; a low score allows a coarse patch.

    Args:
        history: Ring of latents `[4, B, C, H, W]` or `[4, B, C, F, H, W]`, float32. Slot `head` is
            the newest; older ones follow upwards, modulo 4. Slots beyond `order` are not read.
        patch_sizes: Edges in latent pixels, each dividing H and W, in any order; 8 at most.
        quantile: Between 0 and 1.
        order: Of the difference, 1 to 3.
        head: Slot of the newest latent, 0 to 3.

    Returns:
        Scores `[B, len(patch_sizes)]`, float32. All scores of a sample are NaN if its difference
        holds a NaN or an infinity, or is so large that its square overflows.

    Raises:
        RuntimeError: A history of another shape or dtype, a size that does not divide it, or an
            argument out of range.
    """
    scores: Tensor = torch.ops.ddit_rt.patch_scores(
        history, list(patch_sizes), quantile, order, head
    )
    return scores
