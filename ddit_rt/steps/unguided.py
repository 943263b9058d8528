"""A bucket in the steps of a guided run that are not guided."""

from __future__ import annotations

from torch import Tensor

from ddit_rt.steps.base import Bucket, StepInputs


class UnguidedBucket:
    """Another bucket without its pass with the negative prompt; it shares that bucket's memory."""

    def __init__(self, bucket: Bucket) -> None:
        self.multiple = bucket.multiple
        self.tokens = bucket.tokens
        self._bucket = bucket

    def velocity(
        self, latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = False
    ) -> Tensor:
        """See `Bucket.velocity`; never guided."""
        del guided
        return self._bucket.velocity(latents, step, reuse=reuse, guided=False)

    def residuals(self) -> tuple[Tensor, ...]:
        """See `Bucket.residuals`."""
        return self._bucket.residuals()

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Bucket.tensors`."""
        return self._bucket.tensors()

    def state(self) -> tuple[Tensor, ...]:
        """See `Bucket.state`."""
        return self._bucket.state()

    def refresh(self, step: int, now: StepInputs) -> None:
        """See `Bucket.refresh`."""
        self._bucket.refresh(step, now)
