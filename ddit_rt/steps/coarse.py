"""A coarse step that needs no training: the model sees a smaller image at its true noise level.

Averaging s x s latent pixels keeps the image but divides the standard deviation of white
noise by s, so a reduced z at noise level t is not a small image at level t. Rescaled, it is
one at another level t' (rectified flow, z = (1 - t) x0 + t n):

    z_low = mean over s x s of z;  a = 1 - t;  b = t / s
    z'    = z_low / (a + b);       t' = b / (a + b)
    x0_low = z' - t' model(z', t')             with the positions of a real small image
    x0     = x0_fine + up(x0_low - down(x0_fine) - e)
    v      = (z - x0) / t                      which keeps the high-frequency noise of z

x0_fine is the clean estimate of the latest step at p (zero before there is one): detail found
once is kept. e is how far the small image disagreed with it at the first coarse step after it,
when both should still agree; it fades as (t / t_first)^2. Without e, a model that sees the two
sizes a little differently would be pulled off its layout by every coarse step. `up` is bicubic,
`down` the mean. A video is reduced frame by frame: its small image has all of its frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddit_rt.steps.base import Detail, RunContext, Runners, StepInputs, StepModel, at_step
from ddit_rt.steps.forward import make_passes


def matched_level(sigmas: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Scale 1 / (a + b) and noise level t' of the reduced latent.

    Args:
        sigmas: Noise levels t, `[N]`, in (0, 1].
        multiple: s.

    Returns:
        Two tensors `[N]`, float32.
    """
    levels = sigmas.to(torch.float64)
    noise = levels / multiple
    scale = 1 / (1 - levels + noise)
    return scale.float(), (noise * scale).float()


class SnrBucket:
    """The training-free coarse bucket at s times p."""

    def __init__(
        self,
        model: StepModel,
        context: RunContext,
        multiple: int,
        runners: Runners | None = None,
    ) -> None:
        """Prepares a run at `multiple` times p; `runners` are by default the unmodified blocks."""
        grid = model.grid(context.height, context.width, multiple, context.frames)
        self.multiple = multiple
        self.tokens = grid.tokens
        self._model = model
        self._context = context
        self._low = (context.height // multiple, context.width // multiple)
        self._scale, self._level = matched_level(context.sigmas, multiple)
        self._passes = make_passes(model, context, grid, self._low, self._level, runners=runners)
        self._correction: _Correction | None = None
        if (detail := context.detail) is not None:
            if multiple not in detail.corrections:
                detail.corrections[multiple] = _Correction(detail, multiple)
            self._correction = detail.corrections[multiple]

    def velocity(
        self, latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = True
    ) -> Tensor:
        """See `Bucket.velocity`."""
        low = self._reduce(latents, step)
        low_velocity = self._passes.velocity(low, step, reuse=reuse, guided=guided)
        return self._enlarge(latents, low, low_velocity, step)

    def _reduce(self, latents: Tensor, step: Tensor) -> Tensor:
        """The small image z': `[B, C, H, W]` to `[B, C, H/s, W/s]`."""
        return down(latents, self.multiple) * at_step(self._scale, step)

    def _enlarge(self, latents: Tensor, low: Tensor, low_velocity: Tensor, step: Tensor) -> Tensor:
        """Velocity from that of the small image: `[B, C, H/s, W/s]` to `[B, C, H, W]`."""
        sigma = at_step(self._context.sigmas, step)
        clean = torch.addcmul(low, low_velocity.float(), at_step(self._level, step), value=-1)
        if self._correction is None:
            clean = up(clean, self.multiple)
        else:
            clean = self._correction.enlarge(clean, sigma)
        return (latents - clean) / sigma

    def residuals(self) -> tuple[Tensor, ...]:
        """See `Bucket.residuals`."""
        return self._passes.residuals()

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Bucket.tensors`."""
        return (self._scale, self._level, *self._passes.tensors(), *self.state())

    def state(self) -> tuple[Tensor, ...]:
        """See `Bucket.state`."""
        return () if self._correction is None else self._correction.tensors()

    def refresh(self, step: int, now: StepInputs) -> None:
        """See `Bucket.refresh`."""
        self._context.sigmas[step].copy_(now.sigma)
        scale, level = matched_level(now.sigma, self.multiple)
        self._scale[step].copy_(scale)
        self._level[step].copy_(level)
        self._passes.refresh(step, level.reshape(1), now.conditioning)


class _Correction:
    """Enlarges a clean estimate so that it keeps the detail and layout of the latest fine step."""

    def __init__(self, detail: Detail, multiple: int) -> None:
        self._detail = detail
        self._multiple = multiple
        # Before the first step at p all is 0: no disagreement is known.
        self._serial = torch.zeros_like(detail.serial)
        self._disagreement = down(detail.estimate, multiple)

    def enlarge(self, clean: Tensor, sigma: Tensor) -> Tensor:
        """`[B, C, h, w]` to `[B, C, H, W]`."""
        detail = self._detail
        change = clean - down(detail.estimate, self._multiple)
        fade = sigma.square()
        is_first = detail.serial != self._serial
        # In place: what lives across steps must lie where a captured graph finds it again.
        self._disagreement.copy_(torch.where(is_first, change / fade, self._disagreement))
        self._serial.copy_(detail.serial)
        change = change - self._disagreement * fade
        return detail.estimate + up(change, self._multiple)

    def tensors(self) -> tuple[Tensor, ...]:
        """As `Bucket.tensors`."""
        return (self._serial, self._disagreement)


def down(latents: Tensor, multiple: int) -> Tensor:
    """Means over s x s: `[B, C, H, W]` or `[B, C, F, H, W]`, each frame by itself."""
    planes = F.avg_pool2d(latents.flatten(1, -3), multiple)
    return planes.view(*latents.shape[:-2], *planes.shape[-2:])


def up(latents: Tensor, multiple: int) -> Tensor:
    """Bicubic enlargement by s, of the same shapes."""
    planes = F.interpolate(latents.flatten(1, -3), scale_factor=multiple, mode="bicubic")
    return planes.view(*latents.shape[:-2], *planes.shape[-2:])
