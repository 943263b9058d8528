"""The base bucket: the unmodified model at its own patch size p."""

from __future__ import annotations

from torch import Tensor

from ddit_rt.steps.base import RunContext, StepInputs, StepModel, at_step
from ddit_rt.steps.forward import make_passes


class FineBucket:
    """v = model(z, t), as the diffusers pipeline computes it."""

    multiple = 1

    def __init__(self, model: StepModel, context: RunContext) -> None:
        grid = model.grid(context.height, context.width, frames=context.frames)
        self.tokens = grid.tokens
        self._context = context
        size = (context.height, context.width)
        self._passes = make_passes(model, context, grid, size, context.timesteps)

    def velocity(
        self, latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = True
    ) -> Tensor:
        """See `Bucket.velocity`."""
        context = self._context
        velocity = self._passes.velocity(latents, step, reuse=reuse, guided=guided)
        if context.detail is not None:
            context.detail.update(latents, velocity, at_step(context.sigmas, step))
        return velocity

    def residuals(self) -> tuple[Tensor, ...]:
        """See `Bucket.residuals`."""
        return self._passes.residuals()

    def sound(self) -> Tensor | None:
        """See `Bucket.sound`."""
        return self._passes.sound()

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Bucket.tensors`."""
        return self._passes.tensors()

    def state(self) -> tuple[Tensor, ...]:
        """See `Bucket.state`."""
        detail = self._context.detail
        return () if detail is None else detail.state()

    def refresh(self, step: int, now: StepInputs) -> None:
        """See `Bucket.refresh`."""
        self._context.sigmas[step].copy_(now.sigma)
        self._passes.refresh(step, now.timestep, now.conditioning)
