"""The base bucket: the unmodified model at its own patch size p."""

from __future__ import annotations

from torch import Tensor

from ddit_rt import ops
from ddit_rt.steps.base import RunContext, StepInputs, StepModel, at_step
from ddit_rt.steps.passes import Passes


class FineBucket:
    """v = model(z, t), as the diffusers pipeline computes it."""

    multiple = 1

    def __init__(self, model: StepModel, context: RunContext) -> None:
        grid = model.grid(context.height, context.width, frames=context.frames)
        self.tokens = grid.tokens
        self._model = model
        self._context = context
        self._passes = Passes(model, context, grid, context.timesteps)

    def velocity(
        self, latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = True
    ) -> Tensor:
        """See `Bucket.velocity`."""
        model, context = self._model, self._context
        tokens = ops.pack(latents.to(model.dtype), model.patch_size)
        hidden = model.family.embed_tokens(model.transformer, tokens)
        tokens = self._passes(hidden, step, reuse=reuse, guided=guided)
        velocity = model.unpack(tokens, context.height, context.width, context.frames)
        if context.detail is not None:
            context.detail.update(latents, velocity, at_step(context.sigmas, step))
        return velocity

    def residuals(self) -> tuple[Tensor, ...]:
        """See `Bucket.residuals`."""
        return self._passes.residuals()

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
