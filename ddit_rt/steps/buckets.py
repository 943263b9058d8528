"""How a step is taken: at p by the unmodified model, or coarse, without training.

In a coarse step the model sees a smaller image, at the noise level that this image has.

Each axis of H pixels is reduced to h <= H by keeping the h lowest frequencies of its orthonormal
discrete cosine transform D (DCT-II), whatever the ratio:

    down = sqrt(h / H) D_h^T (D_H)[:h]

Both D are orthogonal, so the rows of D_h^T (D_H)[:h] are orthonormal: white noise stays white, up
to the edges, and its standard deviation becomes r = sqrt(h w / (H W)), over both axes; where s
divides, r = 1 / s. An axis that stays as it is counts for nothing: of latents of time alone, whose
one row stays, r = sqrt(w / W), where s divides sqrt(1 / s). The sqrt keeps constants what they are.
So a reduced z at noise level t is not a small image at level t, but, rescaled, one at another
level t' (rectified flow, z = (1 - t) x0 + t n):

    z_low = down z;  a = 1 - t;  b = t r
    z'    = z_low / (a + b);     t' = b / (a + b)
    x0_low = z' - t' model(z', t')             with the positions of a real small image
    x0     = x0_fine + up(x0_low - down(x0_fine) - e)
    v      = (z - x0) / t                      which keeps the high-frequency noise of z

x0_fine is the clean estimate of the latest step at p (zero before there is one): detail found
once is kept. e is how far the small image disagreed with it at the first coarse step after it,
when both should still agree; it fades as (t / t_first)^2. Without e, a model that sees the two
sizes a little differently would be pulled off its layout by every coarse step. `up` is bicubic.
A video is reduced frame by frame: its small image has all of its frames.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ddit_rt.steps.base import Detail, RunContext, Runners, StepInputs, StepModel, at_step
from ddit_rt.steps.forward import ForwardPasses, make_passes
from ddit_rt.steps.passes import Passes


class PassesBucket:
    """What a bucket keeps in the passes that it runs."""

    _passes: Passes | ForwardPasses

    def residuals(self) -> tuple[Tensor, ...]:
        """See `Bucket.residuals`."""
        return self._passes.residuals()

    def sound(self) -> Tensor | None:
        """See `Bucket.sound`."""
        return self._passes.sound()


class FineBucket(PassesBucket):
    """v = model(z, t), as the diffusers pipeline computes it."""

    multiple = 1

    def __init__(self, model: StepModel, context: RunContext) -> None:
        grid = model.grid(context.height, context.width, frames=context.frames)
        self.tokens = grid.tokens
        self._context = context
        size = (context.height, context.width)
        self._passes = make_passes(
            model, context, grid, size, context.timesteps, first_blocks=context.first_blocks
        )

    def begin(self, latents: Tensor, step: Tensor) -> None:
        """Runs the first block of every pass, into the context's, on what `velocity` takes."""
        self._passes.begin(latents, step)

    def velocity(
        self, latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = True
    ) -> Tensor:
        """See `Bucket.velocity`."""
        context = self._context
        if context.late and context.first_blocks:
            self.begin(latents, step)
        velocity = self._passes.velocity(latents, step, reuse=reuse, guided=guided)
        if context.detail is not None:
            context.detail.update(latents, velocity, at_step(context.sigmas, step))
        return velocity

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


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def low_pass(size: int, small: int) -> Tensor:
    """`down` of one axis, `[small, size]`, float32."""
    kept = dct(size)[:small]
    return (math.sqrt(small / size) * dct(small).T @ kept).float()


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def bicubic(small: int, size: int) -> Tensor:
    """`up` of one axis, `[size, small]`, float32."""
    units = torch.eye(small, dtype=torch.float64, device="cpu").reshape(1, small, small, 1)
    return F.interpolate(units, size=(size, 1), mode="bicubic")[0, :, :, 0].T.float()


def dct(size: int) -> Tensor:
    """The orthonormal DCT-II, `[size, size]`, float64: a row for each frequency."""
    places = torch.arange(size, dtype=torch.float64, device="cpu")
    angles = math.pi / size * torch.outer(places, places + 0.5)
    basis = math.sqrt(2 / size) * torch.cos(angles)
    basis[0] = math.sqrt(1 / size)
    return basis


class Resampling:
    """The linear maps between latents and their small image, each frame by itself.

    Attributes:
        small: Rows and columns of the small image.
        deviation: r, the standard deviation of reduced white noise of unit variance.
    """

    def __init__(self, size: tuple[int, int], small: tuple[int, int], device: torch.device) -> None:
        """Makes the maps from `size` to `small`, rows and columns, which may not be larger."""
        self.small = small
        self.deviation = math.sqrt(math.prod(small) / math.prod(size))
        (height, width), (rows, columns) = size, small
        # As matrix products, because torch's own enlargement takes ten times as long on a CPU.
        self._down = _on(device, low_pass(height, rows), low_pass(width, columns).T)
        self._up = _on(device, bicubic(rows, height), bicubic(columns, width).T)

    @classmethod
    def of(cls, model: StepModel, size: tuple[int, int], multiple: int) -> Resampling:
        """The maps of latents of `size` at `multiple` times p."""
        return cls(size, model.small_size(*size, multiple), model.device)

    def down(self, latents: Tensor) -> Tensor:
        """`[B, C, H, W]` or `[B, C, F, H, W]` to the small image, float32."""
        rows, columns = self._down
        return rows @ (latents @ columns)

    def up(self, small: Tensor) -> Tensor:
        """The bicubic enlargement of a small image, of the same shapes."""
        rows, columns = self._up
        return rows @ (small @ columns)


def _on(device: torch.device, *matrices: Tensor) -> tuple[Tensor, ...]:
    return tuple(matrix.contiguous().to(device) for matrix in matrices)


def matched_level(sigmas: Tensor, deviation: float) -> tuple[Tensor, Tensor]:
    """Scale 1 / (a + b) and noise level t' of the reduced latent.

    Args:
        sigmas: Noise levels t, `[N]`, in (0, 1].
        deviation: r.

    Returns:
        Two tensors `[N]`, float32.
    """
    levels = sigmas.to(torch.float64)
    noise = levels * deviation
    scale = 1 / (1 - levels + noise)
    return scale.float(), (noise * scale).float()


class SnrBucket(PassesBucket):
    """The training-free coarse bucket at s times p."""

    def __init__(
        self,
        model: StepModel,
        context: RunContext,
        multiple: int,
        runners: Runners | None = None,
    ) -> None:
        """Prepares a run at `multiple` times p; `runners` are by default the unmodified blocks."""
        size = context.height, context.width
        grid = model.grid(*size, multiple, context.frames)
        self.multiple = multiple
        self.tokens = grid.tokens
        self._model = model
        self._context = context
        self._maps = Resampling.of(model, size, multiple)
        self._scale, self._level = matched_level(context.sigmas, self._maps.deviation)
        low = self._maps.small
        self._passes = make_passes(model, context, grid, low, self._level, runners=runners)
        self._correction: _Correction | None = None
        if (detail := context.detail) is not None:
            if multiple not in detail.corrections:
                detail.corrections[multiple] = _Correction(detail, self._maps)
            self._correction = detail.corrections[multiple]

    def velocity(
        self, latents: Tensor, step: Tensor, *, reuse: bool = False, guided: bool = True
    ) -> Tensor:
        """See `Bucket.velocity`."""
        low = self._reduce(latents, step)
        low_velocity = self._passes.velocity(low, step, reuse=reuse, guided=guided)
        return self._enlarge(latents, low, low_velocity, step)

    def _reduce(self, latents: Tensor, step: Tensor) -> Tensor:
        """The small image z': `[B, C, H, W]` to `[B, C, h, w]`."""
        return self._maps.down(latents) * at_step(self._scale, step)

    def _enlarge(self, latents: Tensor, low: Tensor, low_velocity: Tensor, step: Tensor) -> Tensor:
        """Velocity from that of the small image: `[B, C, h, w]` to `[B, C, H, W]`."""
        sigma = at_step(self._context.sigmas, step)
        clean = torch.addcmul(low, low_velocity.float(), at_step(self._level, step), value=-1)
        if self._correction is None:
            clean = self._maps.up(clean)
        else:
            clean = self._correction.enlarge(clean, sigma)
        return (latents - clean) / sigma

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Bucket.tensors`."""
        return (self._scale, self._level, *self._passes.tensors(), *self.state())

    def state(self) -> tuple[Tensor, ...]:
        """See `Bucket.state`."""
        return () if self._correction is None else self._correction.tensors()

    def refresh(self, step: int, now: StepInputs) -> None:
        """See `Bucket.refresh`."""
        self._context.sigmas[step].copy_(now.sigma)
        scale, level = matched_level(now.sigma, self._maps.deviation)
        self._scale[step].copy_(scale)
        self._level[step].copy_(level)
        self._passes.refresh(step, level.reshape(1), now.conditioning)


class _Correction:
    """Enlarges a clean estimate so that it keeps the detail and layout of the latest fine step."""

    def __init__(self, detail: Detail, maps: Resampling) -> None:
        self._detail = detail
        self._maps = maps
        # Before the first step at p all is 0: no disagreement is known.
        self._serial = torch.zeros_like(detail.serial)
        self._disagreement = maps.down(detail.estimate)

    def enlarge(self, clean: Tensor, sigma: Tensor) -> Tensor:
        """`[B, C, h, w]` to `[B, C, H, W]`."""
        detail = self._detail
        change = clean - self._maps.down(detail.estimate)
        fade = sigma.square()
        is_first = detail.serial != self._serial
        # In place: what lives across steps must lie where a captured graph finds it again.
        self._disagreement.copy_(torch.where(is_first, change / fade, self._disagreement))
        self._serial.copy_(detail.serial)
        change = change - self._disagreement * fade
        return detail.estimate + self._maps.up(change)

    def tensors(self) -> tuple[Tensor, ...]:
        """What it keeps from step to step, as `Bucket.tensors` gives it."""
        return (self._serial, self._disagreement)
