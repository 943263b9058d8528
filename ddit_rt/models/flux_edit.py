"""FLUX.1 beyond text to image: img2img, Kontext, Fill and inpaint, by the model's own forward.

All share what `flux_forward.py` says; `flux.py` is the text-to-image family.
Kontext appends the tokens of reference images, which stay as they are in coarse steps. Fill has
further channels, which are made smaller with the image. None of these pipelines marks its passes
by a `cache_context`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.calls import ModelCall
from ddit_rt.models.description import REFERENCE, REFERENCE_IDS
from ddit_rt.models.flux_forward import FluxForwardFamily
from ddit_rt.models.smaller import smaller_both


class FluxImageFamily(FluxForwardFamily):
    """Image to image: `strength` says how much of the schedule is left."""

    name: ClassVar[str] = "flux-img2img"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxImg2ImgPipeline",)


class FluxInpaintFamily(FluxForwardFamily):
    """Inpainting with a model of text to image."""

    name: ClassVar[str] = "flux-inpaint"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxInpaintPipeline",)
    own_loop: ClassVar[str] = (
        "FluxInpaintPipeline puts the image back outside the mask after every step"
    )

    def given_latents(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See `Family.given_latents`: this pipeline packs them itself."""
        return shape


class FluxKontextFamily(FluxForwardFamily):
    """Editing by reference images, whose tokens follow the image's."""

    name: ClassVar[str] = "flux-kontext"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxKontextPipeline",)
    unbatched: ClassVar[tuple[str, ...]] = (REFERENCE_IDS,)
    extra: ClassVar[tuple[str, ...]] = (REFERENCE, REFERENCE_IDS)

    def size_of(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, int]:
        """See `Family.size_of`: the aspect ratio asked for, at the area `max_area`."""
        height, width = super().size_of(pipeline, call)
        ratio, area = width / height, call["max_area"]
        unit = pipeline.vae_scale_factor * self.patch
        rows, columns = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
        return rows // unit * unit, columns // unit * unit


class FluxFillFamily(FluxForwardFamily):
    """In- and outpainting by a model that sees the mask and the image around it."""

    name: ClassVar[str] = "flux-fill"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxFillPipeline",)
    extra: ClassVar[tuple[str, ...]] = ("fill",)

    def check_model(self, transformer: Any, pipeline: Any) -> None:
        """Refuses a model without the channels of image and mask."""
        side = math.isqrt(max(self._mask_channels(transformer), 0))
        if side < 1 or side**2 != self._mask_channels(transformer):
            raise UnsupportedModelError(
                f"got a transformer of in_channels={transformer.config.in_channels} for "
                "FluxFillPipeline, which fills those of latents, image and mask; use FLUX.1-Fill"
            )

    def _mask_channels(self, transformer: Any) -> int:
        """Those of the mask: its pixels in a latent pixel."""
        channels = int(transformer.config.in_channels) // self.patch**2
        return channels - 2 * self.latent_channels(transformer)

    def shapes(
        self, transformer: Any, variant: int, batch: int, text: int
    ) -> dict[str, tuple[int, ...]]:
        """See `Family.shapes`."""
        channels = self.latent_channels(transformer) + self._mask_channels(transformer)
        own = super().shapes(transformer, variant, batch, text)
        return {**own, "fill": (batch, channels, 1, 1)}

    def scale_of(self, pipeline: Any, call: Mapping[str, Any]) -> float | None:
        """See `Family.scale_of`: the pipeline has none."""
        return None

    def read_model_call(
        self, transformer: nn.Module, shape: tuple[int, ...], arguments: Mapping[str, Any]
    ) -> ModelCall:
        """See `Family.read_model_call`: channels behind the latents' are kept, `[B, C, H, W]`."""
        hidden, own = arguments["hidden_states"], self.patch**2 * shape[1]
        fill = self.unpack_latents(hidden[..., own:], shape)
        given = {**arguments, "hidden_states": hidden[..., :own], "fill": fill}
        return super().read_model_call(transformer, shape, given)

    def forward_arguments(
        self, latents: Tensor, level: Tensor, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Family.forward_arguments`."""
        prompt = dict(arguments)
        fill = smaller_both(prompt.pop("fill"), latents.shape[1], latents.shape[-2:])
        given = super().forward_arguments(latents, level, prompt)
        given["hidden_states"] = self.pack_latents(torch.cat((latents, fill), dim=1).contiguous())
        return given
