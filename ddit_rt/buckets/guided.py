"""Classifier-free guidance: a wrapper around the velocities of one patch size.

    v = v_negative + scale (v_prompt - v_negative)

The scale is a step's own; where it is 1, v is v_prompt, to the bit. Both halves of a step run at
the same patch size: there is one latent, and so one decision. Each half keeps its own detail, and
its own residual where steps may reuse. The training-free step is affine in what the model says now
and said at its latest step at p, and the two weights add up to 1, so guiding its velocities is the
same as guiding the model inside it. Where the scale changes between two steps, so does what the
kept detail counts: both halves keep theirs whole, and the formula joins them with the scale of the
later step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddit_rt.buckets.base import Bucket, at_step


class GuidedBucket:
    """Two halves of one patch size, as one batch of two or one after the other."""

    def __init__(self, halves: Sequence[Bucket], scales: Tensor) -> None:
        """Joins the halves.

        Args:
            halves: Two buckets, with the prompt and with the negative prompt; or one over a
                batch twice as large, prompts first.
            scales: Scale of every step, `[M]`, float32, read on the device.
        """
        assert len(halves) in (1, 2), "one batch of two, or two passes"
        self.multiple = halves[0].multiple
        # Of one half: the step is on the same latent, whatever guides it.
        self.tokens = halves[0].tokens
        self._halves = tuple(halves)
        self._scales = scales

    def velocity(self, latents: Tensor, step: Tensor, *, reuse: bool = False) -> Tensor:
        """See `Bucket.velocity`."""
        if len(self._halves) == 1:
            both = self._halves[0].velocity(torch.cat((latents, latents)), step, reuse=reuse)
            prompt, negative = both.chunk(2)
        else:
            prompt, negative = (half.velocity(latents, step, reuse=reuse) for half in self._halves)
        # Without dimensions, the scale leaves the velocities' dtype as it is, as in diffusers.
        scale = at_step(self._scales, step)
        return torch.where(scale == 1, prompt, negative + scale * (prompt - negative))

    def residuals(self) -> tuple[Tensor, ...]:
        """See `Bucket.residuals`."""
        return tuple(residual for half in self._halves for residual in half.residuals())

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Bucket.tensors`."""
        halves = (tensor for half in self._halves for tensor in half.tensors())
        return (self._scales, *halves)
