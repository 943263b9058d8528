"""The patch scheduler's decision for one step, as an op that needs no host."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


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
