"""A coarse step that needs no training: the model sees a smaller picture at its true noise level.

Averaging s x s latent pixels keeps the picture but divides the standard deviation of white
noise by s, so a reduced z at noise level t is not a small picture at level t. Rescaled, it is
one at another level t' (rectified flow, z = (1 - t) x0 + t n):

    z_low = mean over s x s of z;  a = 1 - t;  b = t / s
    z'    = z_low / (a + b);       t' = b / (a + b)
    x0_low = z' - t' model(z', t')             with the positions of a real small picture
    x0     = x0_fine + up(x0_low - down(x0_fine) - e)
    v      = (z - x0) / t                      which keeps the high-frequency noise of z

x0_fine is the clean estimate of the latest step at p (zero before there is one): detail found
once is kept. e is how far the small picture disagreed with it at the first coarse step after it,
when both should still agree; it fades as (t / t_first)^2. Without e, a model that sees the two
sizes a little differently would be pulled off its layout by every coarse step. `up` is bicubic,
`down` the mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddit_rt import ops
from ddit_rt.buckets.base import Detail, RunContext, StepModel, token_velocity


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

    def __init__(self, model: StepModel, context: RunContext, multiple: int) -> None:
        grid = model.grid(context.height, context.width, multiple)
        family, transformer = model.family, model.transformer
        self.multiple = multiple
        self.tokens = grid.tokens
        self._model = model
        self._context = context
        self._low = (context.height // multiple, context.width // multiple)
        self._positions = family.positions(transformer, grid, context.text.shape[1])
        self._scale, self._level = matched_level(context.sigmas, multiple)
        self._temb = family.embed_time(transformer, self._level, context.conditioning)
        # Before the first step at p both numbers are 0: no disagreement is known.
        self._serial = torch.zeros((), dtype=torch.int64)
        self._disagreement = torch.zeros(())

    def velocity(self, latents: Tensor, step: int) -> Tensor:
        """See `Bucket.velocity`."""
        model, context = self._model, self._context
        low = F.avg_pool2d(latents, self.multiple) * self._scale[step]
        tokens = ops.pack(low.to(model.dtype), model.patch_size)
        hidden = model.family.embed_tokens(model.transformer, tokens)
        tokens = token_velocity(model, hidden, context.text, self._temb[step], self._positions)
        low_velocity = ops.unpack(tokens, model.patch_size, *self._low)
        clean = torch.addcmul(low, low_velocity.float(), self._level[step], value=-1)
        if context.detail is None:
            clean = F.interpolate(clean, scale_factor=self.multiple, mode="bicubic")
        else:
            clean = self._corrected(clean, context.detail, context.sigmas[step])
        return (latents - clean) / context.sigmas[step]

    def _corrected(self, clean: Tensor, detail: Detail, sigma: Tensor) -> Tensor:
        """Enlarged clean estimate that keeps the detail and the layout of the latest fine step."""
        change = clean - F.avg_pool2d(detail.estimate, self.multiple)
        fade = sigma.square()
        is_first = detail.serial != self._serial
        self._disagreement = torch.where(is_first, change / fade, self._disagreement)
        self._serial.copy_(detail.serial)
        change = change - self._disagreement * fade
        return detail.estimate + F.interpolate(change, scale_factor=self.multiple, mode="bicubic")
