"""What the blocks of a pass added to the image tokens when they last ran, and would add now.

A step that reuses adds the residual r_1 of the latest computed step. Where two are kept, it
extrapolates linearly in the noise level s from the two latest ones, r_1 at s_1 and r_2 at s_2:

    r(s) = r_1 + (s - s_1) / (s_1 - s_2) (r_1 - r_2)

Both must be of one stretch of steps that ran this pass at this patch size without a gap. The first
computed step of a stretch counts as both, so that steps reuse it as it is until a second computes.
All is decided on the device: which step ran last, and at which levels, are tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NEVER = -2
"""The step before the first of a run, which no step follows."""


class Residual:
    """The residuals of one pass at one patch size."""

    def __init__(self, kept: int, sigmas: Tensor, rows: int = 0) -> None:
        """Nothing is kept yet.

        Args:
            kept: Residuals that are kept, 1 or 2.
            sigmas: Noise level of every step, `[M]`, float32.
            rows: Samples that room is made for; 0: as many as the first step has.
        """
        self._sigmas = sigmas
        self._rows = rows
        self._latest: Tensor | None = None
        self._previous: Tensor | None = None
        self._levels = sigmas.new_zeros(kept)  # s_1, s_2
        # The latest step that ran or reused these blocks, and of how many samples.
        self._seen = torch.full((2,), _NEVER, dtype=torch.int32, device=sigmas.device)

    @property
    def latest(self) -> Tensor:
        """r_1, `[B, n, d]`."""
        assert self._latest is not None, "a step reuses what an earlier one has computed"
        return self._latest

    @property
    def _extrapolates(self) -> bool:
        return len(self._levels) == 2

    def keep(self, before: Tensor, after: Tensor, step: Tensor) -> None:
        """Takes over what the blocks have added in a step.

        Args:
            before: Image tokens `[B, n, d]`.
            after: The same behind the blocks.
            step: k, `[1]`.
        """
        rows = len(before)
        if self._latest is None:
            # Only now, so that a run which lends its tables to a captured bucket has none.
            self._latest = before.new_zeros(self._rows or rows, *before.shape[1:])
        latest = self._latest[:rows]
        if not self._extrapolates:
            torch.sub(after, before, out=latest)
            return
        if self._previous is None:
            self._previous = torch.zeros_like(self._latest)
        added, goes_on = after - before, self._goes_on(step, rows)
        # In place: what lives across steps must lie where a captured graph finds it again.
        torch.where(goes_on, latest, added, out=self._previous[:rows])
        latest.copy_(added)
        level = self._sigmas.index_select(0, step)
        self._levels[1:].copy_(torch.where(goes_on, self._levels[:1], level))
        self._levels[:1].copy_(level)

    def added_to(self, before: Tensor, step: Tensor) -> Tensor:
        """Image tokens `[B, n, d]` with what the blocks would add in step k, `[1]`."""
        rows = len(before)
        latest = self.latest[:rows]
        if not self._extrapolates:
            return before + latest
        assert self._previous is not None, "kept with the latest"
        self._goes_on(step, rows)
        newest, older = self._levels
        gap = newest - older
        beyond = self._sigmas.index_select(0, step).squeeze(0) - newest
        # Without dimensions, the weight leaves the residuals' dtype as it is.
        weight = torch.where(gap == 0, 0.0, beyond / gap)
        return before + (latest + weight * (latest - self._previous[:rows]))

    def _goes_on(self, step: Tensor, rows: int) -> Tensor:
        """Whether the step follows the latest one that came here, `[]`; notes that it came."""
        goes_on = (step == self._seen[:1] + 1) & (self._seen[1:] == rows)
        self._seen[:1].copy_(step)
        self._seen[1:].fill_(rows)
        return goes_on.squeeze(0)

    def tensors(self) -> tuple[Tensor, ...]:
        """What a run has to begin anew, as `Bucket.tensors` gives it."""
        return (self._seen, self._levels) if self._extrapolates else ()
