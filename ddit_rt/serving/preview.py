"""Small images of a run in progress, cheaply: a linear map from latents to colours.

The map is fitted, by least squares, to one image that the model's own VAE has decoded, so that no
table of numbers for known models is needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddit_rt.engine.watch import StepView


class LatentToRgb:
    """The map of a model."""

    def __init__(self, latents: Tensor, image: Image.Image) -> None:
        """Fits it.

        Args:
            latents: `[C, h, w]`, clean.
            image: What the VAE made of them.
        """
        channels, height, width = latents.shape
        small = image.convert("RGB").resize((width, height), Image.Resampling.BOX)
        colours = torch.from_numpy(np.array(small)).double().reshape(-1, 3)
        pixels = latents.detach().double().cpu().reshape(channels, -1).T
        rows = torch.cat(
            (pixels, torch.ones(len(pixels), 1, dtype=torch.float64, device=pixels.device)), dim=1
        )
        # Where there are fewer pixels than channels, the smallest map that fits.
        fitted = torch.linalg.lstsq(rows, colours, driver="gelsd").solution
        self._map = fitted.to(latents.device, torch.float32)

    def __call__(self, latents: Tensor) -> Image.Image:
        """An image of latents `[C, h, w]`, one pixel of it for each of theirs."""
        colours = torch.einsum("chw,ck->hwk", latents, self._map[:-1]) + self._map[-1]
        pixels = colours.round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return Image.fromarray(pixels)


class Previews:
    """Previews of one image: what its latents would be if the run went straight to its end."""

    def __init__(self) -> None:
        self._before: Tensor | None = None

    def __call__(self, convert: Any, view: StepView, place: int) -> Image.Image:
        """A preview.

        Args:
            convert: The model's `LatentToRgb`.
            view: The step.
            place: Place of the image in its batch.
        """
        latents = view.latents[place]
        clean, (high, low) = latents, view.sigmas
        if self._before is not None and high != low:
            clean = latents - low * (latents - self._before) / (low - high)
        self._before = latents
        image: Image.Image = convert(clean)
        return image
