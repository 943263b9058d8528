"""The ops as functions: tokens of latents, scores, decisions, and the solver's update."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

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


def patch_scores(
    history: Tensor,
    patch_sizes: Sequence[int],
    quantile: float,
    order: int = 3,
    head: int = 0,
) -> Tensor:
    """Scores candidate patch sizes by the spread of a finite difference of the latents.

    With z0 the newest latent, the difference of order 1, 2 or 3 is `z0 - z1`, `z0 - 2 z1 + z2` or
    `z0 - 3 z1 + 3 z2 - z3`. It is cut into `p x p` patches (all channels, one frame); those that
    reach over an edge have the pixels that are there. The score of size p is the quantile over a
    sample's patches of their standard deviations (`ddof=1`, as `torch.std`), interpolated as
    `torch.quantile` does. Deterministic, in float32, for any number of threads. All sizes come from
    one pass over the history. Source: DDiT, arXiv 2602.16968, section 3.2, which uses order 3 and
    quantile 0.4; a low score allows a coarse patch.

    Args:
        history: Ring of latents `[4, B, C, H, W]` or `[4, B, C, F, H, W]`, float32. Slot `head` is
            the newest; older ones follow upwards, modulo 4. Slots beyond `order` are not read.
        patch_sizes: Edges in latent pixels, in any order; 8 at most.
        quantile: Between 0 and 1.
        order: Order of the difference, 1 to 3.
        head: Slot of the newest latent, 0 to 3.

    Returns:
        Scores `[B, len(patch_sizes)]`, float32. All scores of a sample are NaN if its difference
        holds a NaN or an infinity, or is so large that its square overflows.

    Raises:
        RuntimeError: A history of another shape or dtype, a patch of a single value, or an
            argument out of range.
    """
    scores: Tensor = torch.ops.ddit_rt.patch_scores(
        history, list(patch_sizes), quantile, order, head
    )
    return scores


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Attention without a mask, on a CPU: `softmax(scale * query key^T) value` for each head.

    Compiled blocks call it in the place of `torch.nn.functional.scaled_dot_product_attention`. A
    query's result depends neither on the number of threads nor on the other queries.

    Args:
        query: `[B, n, heads, width]`, float32, of any strides.
        key: `[B, m, heads, width]`, float32, of any strides; at least one token.
        value: As `key`.
        scale: Of the scores; `width ** -0.5` if it is None.

    Returns:
        `[B, n, heads, width]`, float32, contiguous.

    Raises:
        RuntimeError: Shapes that do not fit, or another dtype.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attended: Tensor = torch.ops.ddit_rt.attention(query, key, value, scale)
    return attended


def linear(
    values: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False
) -> Tensor:
    """A linear layer on a CPU, whose weight is read as it lies.

    Compiled blocks call it in the place of `torch.nn.functional.linear` where weights are small. A
    token's result depends neither on the number of threads nor on the other tokens.

    Args:
        values: `[B, n, channels]`, float32, of any strides.
        weight: `[features, channels]`, float32, its channels side by side.
        bias: `[features]`, float32, contiguous.
        gelu: Whether GELU, approximated by tanh, follows.

    Returns:
        `[B, n, features]`, float32, contiguous.

    Raises:
        RuntimeError: Shapes that do not fit, or another dtype or layout.
    """
    out: Tensor = torch.ops.ddit_rt.linear(values, weight, bias, gelu)
    return out


def norm_rotate(heads: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMS norm of queries or keys, then their rotary embedding, on a CPU.

    Channels 2 i and 2 i + 1 are a pair, as diffusers' FLUX and Wan rotate them. The result is the
    same for any number of threads.

    Args:
        heads: `[B, n, heads, width]`, float32; an even width, its channels side by side.
        weight: `[width]` of a norm of each head, or `[heads * width]` of one of all heads.
        cos: `[n, width]`, float32.
        sin: As `cos`.
        eps: Added to the mean of squares.

    Returns:
        `[B, n, heads, width]`, float32, contiguous.

    Raises:
        RuntimeError: Shapes that do not fit, or another dtype or layout.
    """
    rotated: Tensor = torch.ops.ddit_rt.norm_rotate(heads, weight, cos, sin, eps)
    return rotated


class Reason(IntEnum):
    """Why a step got its bucket: the C++ enum `Reason` of `policy.h`, kept equal by a test."""

    FORCED = 0
    """The table names the bucket: a warm-up step, or a fixed plan."""
    BELOW = 1
    """A coarse bucket: its score is below its threshold."""
    ABOVE = 2
    """The base bucket: no score is below its threshold."""
    MONOTONE = 3
    """A coarser bucket was asked for, but buckets may only get finer."""
    DWELL = 4
    """Another bucket was asked for, but the current one has not run long enough."""
    NONFINITE = 5
    """A score is NaN or infinite: the base bucket."""


def decide_(
    scores: Tensor,
    forced: Tensor,
    thresholds: Tensor,
    state: Tensor,
    record: Tensor,
    step: int,
    dwell: int,
    monotone: bool,
) -> None:
    """Chooses one step's bucket for the whole batch; advances the state, writes the record.

    Bucket 0 is the base patch size; bucket i is the i-th coarse candidate, in ascending size.

    1. `forced[step] >= 0` is taken, whatever the scores (FORCED).
    2. If any score is not finite: bucket 0 (NONFINITE), and the state's flag is raised for good.
    3. Each sample takes the largest i with `scores[b, i-1] < thresholds[step, i-1]`, else 0; the
       batch takes the finest of these (BELOW, or ABOVE for bucket 0).
    4. `monotone`: never coarser than the current bucket (MONOTONE if that changed the outcome).
    5. `dwell`: if the outcome is not the current bucket and that has run for fewer than `dwell`
       steps, it stays (DWELL).

    Source of rule 3: DDiT, arXiv 2602.16968, section 3.2.

    Args:
        scores: `[B, S]` float32 from `patch_scores`. On forced steps `[B, 0]` will do.
        forced: `[N]` int32, a bucket, at most S, or -1 for a dynamic step.
        thresholds: `[N, S]` float32; NaN is never met, so it takes a size off the menu.
        state: `[4]` int32: current bucket, its run length, the non-finite flag, and the branch to
            run, which is the bucket; written. Starts a run as (-1, 0, 0, 0).
        record: `[N, 3 + S]` float32; row `step` becomes bucket, `Reason`, run length, and each
            size's largest score in the batch (NaN on forced steps).
        step: Row of the tables.
        dwell: Least number of steps in a row in one bucket; 0 for none.
        monotone: Whether buckets may only get finer.

    Raises:
        RuntimeError: Tensors whose shapes do not agree, another dtype, a number out of range.
    """
    torch.ops.ddit_rt.decide_(
        scores.contiguous(),
        forced.contiguous(),
        thresholds.contiguous(),
        state,
        record,
        step,
        dwell,
        monotone,
    )


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


class CacheGrowth(IntEnum):
    """How the sum of a row grows from step to step: the C++ enum of `step_cache.h`."""

    SUM = 0
    """By the step's change."""
    PRODUCT = 1
    """By |1 - p|, p being the product of the increments since the latest computed step."""
    LATEST = 2
    """Not at all: it is the step's change, measured against the latest computed step."""


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
    growth: CacheGrowth,
) -> None:
    """Decides whether a step whose size `decide_` has chosen reuses; advances memory and state.

    1. `increments[step]` is NaN: compute (FORCED).
    2. The state's non-finite flag is raised: compute (NONFINITE).
    3. The step before ran at another size: compute (CHANGED).
    4. Every row's sum grows, as `growth` says, by its change: of a signal `polynomial(signal[r])`,
       else `increments[step]`. If one is not finite: compute (NONFINITE), and the flag is raised.
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
        growth: See section 4.

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
        growth,
    )


def solver_step_(
    history: Tensor, velocities: Tensor, velocity: Tensor, coefficients: Tensor, step: int
) -> None:
    """Takes one solver step in place: writes the next latent, stores the velocity.

    `z[k+1] = a0 z[k] + a1 z[k-1] + a2 z[k-2] + b0 v[k] + b1 v[k-1] + b2 v[k-2]`, summed from left
    to right in float32. Coefficients are rounded to float32 first and no multiply-add is fused, so
    an Euler step (`a = (1, 0, 0)`, `b = (dt, 0, 0)`) has the bits of `z + dt * v` in torch. A term
    whose coefficient is 0 is not read, so a ring need not be initialised.

    Args:
        history: Ring of latents `[4, B, ...]`, float32; `z[k]` is in slot `-k mod 4`. The slot of
            `z[k+1]`, which held `z[k-3]`, is written.
        velocities: Ring of the D velocities before `v[k]`, `[D, B, ...]`, D = 0 to 2, float32;
            `v[m]` is in slot `m mod D`. `v[k]` is written over `v[k-D]`, after that is read.
        velocity: `v[k]`, `[B, ...]`, float32, bfloat16 or float16.
        coefficients: `[N, 6]`, float64 or float32: a row (a0, a1, a2, b0, b1, b2) per step. A
            `b` beyond D must be 0.
        step: k, the row of the table.

    Raises:
        RuntimeError: Rings and velocity whose shapes do not agree, another dtype, a buffer that is
            not contiguous, a step outside the table.
    """
    torch.ops.ddit_rt.solver_step_(
        history, velocities, velocity.contiguous(), coefficients.contiguous(), step
    )


def solver_step_in_torch(
    history: Tensor, velocities: Tensor, velocity: Tensor, coefficients: Tensor, step: int
) -> None:
    """`solver_step_` in plain torch, for loops that the host drives on a GPU: fits and training.

    The same bits: products and sums are operations of their own, so none are fused.

    Args:
        history: Ring of latents, as `solver_step_` takes it.
        velocities: Ring of velocities, likewise.
        velocity: v[k], likewise.
        coefficients: Table on the CPU, so that the host need not wait for it.
        step: Row k of the table.
    """
    slots = len(velocities)
    past = [velocities[(step - age) % slots] for age in range(1, slots + 1)]
    terms = [*(history[-(step - age) % 4] for age in range(3)), velocity.float(), *past]
    row = coefficients[step].float().tolist()
    row = [*row[:3], *row[3 : 4 + slots]]
    products = [weight * term for weight, term in zip(row, terms, strict=True) if weight]
    total = sum(products[1:], products[0])
    if slots:
        velocities[step % slots].copy_(velocity)
    history[-(step + 1) % 4].copy_(total)


torch.library.impl("ddit_rt::solver_step_", "CUDA", solver_step_in_torch)
