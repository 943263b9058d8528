"""A step from latents that a callback put in the place of the solver's own.

A solver with a corrector goes on from its own latents z, and sees the callback's z' only in the
clean estimate z' - t v(z'). With v' = v(z') - (z' - z) / t, that is z - t v'.
"""

from __future__ import annotations

from torch import Tensor

from ddit_rt.buckets.base import Bucket, at_step
from ddit_rt.buckets.signal import Signal


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

    def velocity(
        self, latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = True
    ) -> Tensor:
        """See `Bucket.velocity`."""
        velocity = self._bucket.velocity(latents + self._change, step, reuse=reuse, guided=guided)
        velocity = velocity - self._change / at_step(self._sigmas, step)
        self._change.zero_()
        return velocity

    def residuals(self) -> tuple[Tensor, ...]:
        """See `Bucket.residuals`."""
        return self._bucket.residuals()

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Bucket.tensors`. The change is the run's, as the text is."""
        return (self._sigmas, *self._bucket.tensors())


class ReplacedSignal(Signal):
    """A step cache's signal at the callback's latents; those of the step before are the solver's.

    Attributes:
        rows: As in `Signal`.
    """

    def __init__(self, signal: Signal, change: Tensor) -> None:
        """Wraps a signal; `change` is that of the run's `ReplacedBucket`."""
        self.rows = signal.rows
        self._signal = signal
        self._change = change

    def change(self, latents: Tensor, previous: Tensor, step: Tensor) -> Tensor:
        """See `Signal.change`."""
        return self._signal.change(latents + self._change, previous, step)

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Bucket.tensors`."""
        return self._signal.tensors()
