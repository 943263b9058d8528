"""Whether a step computes or reuses, as an op that needs no host."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

CACHE_HEADER = 2
"""Words of a cache's memory before one sum per row."""

CACHE_RECORD = 2
"""Columns of a record row: reason, accumulated change."""


class CacheReason(IntEnum):
    """Why a step computed or reused: the C++ enum of `step_cache.h`, kept equal by a test."""

    OFF = 0
    """Computed: the run has no step cache."""
    FORCED = 1
    """Computed: the table says so, as for the first and last steps."""
    CHANGED = 2
    """Computed: the first step in a row at its patch size."""
    ABOVE = 3
    """Computed: the accumulated change is not below the threshold."""
    LIMIT = 4
    """Computed: as many steps in a row as are allowed were reused."""
    NONFINITE = 5
    """Computed: a signal, or a score of this run, is NaN or infinite."""
    REUSED = 6
    """Reused: the accumulated change is below the threshold."""


def decide_reuse_(
    signal: Tensor,
    increments: Tensor,
    coefficients: Tensor,
    state: Tensor,
    memory: Tensor,
    record: Tensor,
    step: int,
    buckets: int,
    threshold: float,
    limit: int,
    product: bool,
) -> None:
    """Decides whether a step whose size `decide_` has chosen reuses; advances memory and state.

    1. `increments[step]` is NaN: compute (FORCED).
    2. The state's non-finite flag is raised: compute (NONFINITE).
    3. The step before ran at another size: compute (CHANGED).
    4. Every row's sum grows by its change: of a signal `polynomial(signal[r])`; with `product`
       `|1 - p|`, p being the product of the increments since the latest computed step; else
       `increments[step]`. If one is not finite: compute (NONFINITE), and the flag is raised.
    5. The largest sum is not below the threshold: compute (ABOVE).
    6. `limit` steps in a row have reused: compute (LIMIT). Otherwise reuse (REUSED).

    A computed step sets the sums back to 0 and the product to 1. Rows are the samples of a batch,
    in every pass of the model: a step reuses only if each one's own sum allows it. Sources:
    TeaCache (arXiv 2411.19108), MagCache (arXiv 2506.09045).

    Args:
        signal: `[R]` float32, the relative change of each row; `[0]` will do where it is not
            read, in forced steps and without coefficients.
        increments: `[N]` float32; NaN: the step computes. Not read otherwise where there are
            coefficients.
        coefficients: `[T]` float32 of a polynomial, highest power first, 7 terms at most; `[0]`:
            there is none.
        state: `[4]` int32 of `decide_`; its last word becomes the branch: the bucket i to compute,
            or `buckets + i` to reuse.
        memory: `[2 + R]` float32, written. A run may start with anything in it, if its first step
            computes.
        record: `[N, 2]` float32; row `step` becomes `CacheReason` and the largest sum before it
            was set back (NaN where it was not looked at).
        step: Row of the tables.
        buckets: Patch sizes, the base among them.
        threshold: Below it a step reuses.
        limit: Steps in a row that may reuse.
        product: See 4.

    Raises:
        RuntimeError: Tensors whose shapes do not agree, another dtype, a number out of range.
    """
    torch.ops.ddit_rt.decide_reuse_(
        signal.contiguous(),
        increments.contiguous(),
        coefficients.contiguous(),
        state,
        memory,
        record,
        step,
        buckets,
        threshold,
        limit,
        product,
    )
