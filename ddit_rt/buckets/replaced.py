"""A step from latents that a callback put in the place of the solver's own.

A solver with a corrector goes on from its own latents z, and sees the callback's z' only in the
clean estimate z' - t v(z'). With v' = v(z') - (z' - z) / t, that is z - t v'.
"""

from __future__ import annotations

from torch import Tensor

from ddit_rt.buckets.base import Bucket, at_step


class ReplacedBucket:
    """v' of another bucket: see the module's formula."""

    def __init__(self, bucket: Bucket, change: Tensor, sigmas: Tensor) -> None:
        """Wraps a bucket.

        Args:
            bucket: The bucket.
            change: z' - z, of the latents' shape, float32; one for all buckets of a run. The step
                that uses it sets it back to 0.
            sigmas: Noise level of every step, `[M]`, float32.
        """
        self.multiple = bucket.multiple
        self.tokens = bucket.tokens
        self._bucket = bucket
        self._change = change
        self._sigmas = sigmas

    def velocity(self, latents: Tensor, step: Tensor) -> Tensor:
        """See `Bucket.velocity`."""
        velocity = self._bucket.velocity(latents + self._change, step)
        velocity = velocity - self._change / at_step(self._sigmas, step)
        self._change.zero_()
        return velocity

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Bucket.tensors`. The change is the run's, as the text is."""
        return (self._sigmas, *self._bucket.tensors())
