"""FLUX.1 beyond text to image: img2img, Kontext, Fill and inpaint, by the model's own forward.

All have `FluxTransformer2DModel` and FLUX's packed latents; `flux.py` is its text-to-image family.
Kontext appends the tokens of reference pictures, which stay as they are in coarse steps. Fill has
further channels, which are made smaller with the picture. None of these pipelines marks its passes
by a `cache_context`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddit_rt import ops
from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.calls import ModelCall, PipelineCall
from ddit_rt.models.flux_calls import PATCH, ignored_arguments, wants_true_cfg
from ddit_rt.models.forward import REFERENCE, ForwardFamily
from ddit_rt.models.smaller import smaller_both


class FluxImageFamily(ForwardFamily):
    """Image to image: `strength` says how much of the schedule is left."""

    name: ClassVar[str] = "flux-img2img"
    transformer_class: ClassVar[str] = "FluxTransformer2DModel"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxImg2ImgPipeline",)
    conditioning_names: ClassVar[tuple[str, ...]] = (
        "encoder_hidden_states",
        "pooled_projections",
        "guidance",
    )
    held: ClassVar[tuple[str, ...]] = ("context_embedder", "pos_embed")
    timed: ClassVar[tuple[str, ...]] = ("time_text_embed",)
    sized: ClassVar[tuple[str, ...]] = ("img_ids", "txt_ids")

    def check_model(self, transformer: Any, pipeline: Any) -> None:
        """Refuses a model with channels that the pipeline does not fill."""
        del pipeline
        config = transformer.config
        if (config.out_channels or config.in_channels) != config.in_channels:
            raise UnsupportedModelError(
                f"got a transformer of in_channels={config.in_channels} and out_channels="
                f"{config.out_channels} for {self.pipeline_classes[0]}, which takes as many as it "
                "gives; put one with further channels into a FluxFillPipeline"
            )

    def latent_channels(self, transformer: Any) -> int:
        """The model's `out_channels` count the packed ones."""
        config = transformer.config
        return int(config.out_channels or config.in_channels) // PATCH**2

    def example(self, transformer: Any, variant: int, batch: int, text: int) -> dict[str, Any]:
        """See `ForwardFamily.example`."""
        config = transformer.config
        shapes: dict[str, tuple[int, ...]] = {
            "encoder_hidden_states": (batch, text, config.joint_attention_dim),
            "pooled_projections": (batch, config.pooled_projection_dim),
        }
        if config.guidance_embeds:
            shapes["guidance"] = (batch,)
        return {
            name: torch.empty(shape, dtype=transformer.dtype, device="meta")
            for name, shape in shapes.items()
        }

    def resized(self, arguments: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """See `ForwardFamily.resized`: text tokens all sit at (0, 0, 0)."""
        text = arguments["encoder_hidden_states"]
        rows, columns = (
            torch.arange(size // PATCH, dtype=torch.float32, device=text.device)
            for size in shape[-2:]
        )
        ids = torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns)
        return {"img_ids": ids, "txt_ids": torch.zeros_like(ids[:1]).repeat(text.shape[1], 1)}

    def scale_of(self, pipeline: Any, call: Mapping[str, Any]) -> float | None:
        """See `ForwardFamily.scale_of`: true guidance, with a negative prompt."""
        return float(call["true_cfg_scale"]) if wants_true_cfg(call) else None

    def read_call(
        self, pipeline: Any, scheduler: Any, arguments: Mapping[str, Any]
    ) -> PipelineCall:
        """See `Family.read_call`."""
        call = super().read_call(pipeline, scheduler, arguments)
        distilled = bool(pipeline.transformer.config.guidance_embeds)
        return replace(call, ignored=ignored_arguments(arguments, distilled=distilled))

    def pack_latents(self, latents: Tensor) -> Tensor:
        """Packed tokens `[B, n, 4C]`."""
        return ops.pack(latents, PATCH)

    def unpack_latents(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """See `Family.unpack_latents`; tokens of references, behind these, are left out."""
        own = latents[:, : _tokens(shape)].contiguous()
        return ops.unpack(own, PATCH, shape[-2], shape[-1])


class FluxInpaintFamily(FluxImageFamily):
    """Inpainting with a model of text to image."""

    name: ClassVar[str] = "flux-inpaint"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxInpaintPipeline",)
    own_loop: ClassVar[str] = (
        "FluxInpaintPipeline puts the picture back outside the mask after every step"
    )

    def given_latents(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See `ForwardFamily.given_latents`: this pipeline packs them itself."""
        return shape


class FluxKontextFamily(FluxImageFamily):
    """Editing by reference pictures, whose tokens follow the picture's."""

    name: ClassVar[str] = "flux-kontext"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxKontextPipeline",)
    unbatched: ClassVar[tuple[str, ...]] = ("reference_ids",)
    extra: ClassVar[tuple[str, ...]] = (REFERENCE, "reference_ids")

    def size_of(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, int]:
        """See `ForwardFamily.size_of`: the aspect ratio asked for, at the area `max_area`."""
        height, width = super().size_of(pipeline, call)
        ratio, area = width / height, call["max_area"]
        unit = pipeline.vae_scale_factor * PATCH
        rows, columns = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
        return rows // unit * unit, columns // unit * unit

    def more_tokens(self, conditioning: Mapping[str, Any]) -> int:
        """See `ForwardFamily.more_tokens`."""
        reference = conditioning.get(REFERENCE)
        return 0 if reference is None else int(reference.shape[1])

    def read_model_call(
        self, transformer: nn.Module, shape: tuple[int, ...], arguments: Mapping[str, Any]
    ) -> ModelCall:
        """See `Family.read_model_call`: positions behind the picture's are kept."""
        given, own = dict(arguments), _tokens(shape)
        if given["hidden_states"].shape[1] > own:
            given["reference_ids"] = given["img_ids"][own:]
        return super().read_model_call(transformer, shape, given)

    def forward_arguments(
        self, latents: Tensor, level: Tensor, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `ForwardFamily.forward_arguments`."""
        prompt = dict(arguments)
        ids = prompt.pop("reference_ids", None)
        given = super().forward_arguments(latents, level, prompt)
        if ids is not None:
            given["img_ids"] = torch.cat((given["img_ids"], ids.float()))
        return given


class FluxFillFamily(FluxImageFamily):
    """In- and outpainting by a model that sees the mask and the picture around it."""

    name: ClassVar[str] = "flux-fill"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxFillPipeline",)
    extra: ClassVar[tuple[str, ...]] = ("fill",)

    def check_model(self, transformer: Any, pipeline: Any) -> None:
        """Refuses a model without the channels of picture and mask."""
        side = math.isqrt(max(self._mask_channels(transformer), 0))
        if side < 1 or side**2 != self._mask_channels(transformer):
            raise UnsupportedModelError(
                f"got a transformer of in_channels={transformer.config.in_channels} for "
                "FluxFillPipeline, which fills those of latents, picture and mask; use FLUX.1-Fill"
            )

    def _mask_channels(self, transformer: Any) -> int:
        """Those of the mask: its pixels in a latent pixel."""
        channels = int(transformer.config.in_channels) // PATCH**2
        return channels - 2 * self.latent_channels(transformer)

    def example(self, transformer: Any, variant: int, batch: int, text: int) -> dict[str, Any]:
        """See `ForwardFamily.example`: a picture of one pixel serves every size."""
        given = super().example(transformer, variant, batch, text)
        channels = self.latent_channels(transformer) + self._mask_channels(transformer)
        fill = torch.empty(batch, channels, 1, 1, dtype=transformer.dtype, device="meta")
        return {**given, "fill": fill}

    def scale_of(self, pipeline: Any, call: Mapping[str, Any]) -> float | None:
        """See `ForwardFamily.scale_of`: the pipeline has none."""
        return None

    def read_model_call(
        self, transformer: nn.Module, shape: tuple[int, ...], arguments: Mapping[str, Any]
    ) -> ModelCall:
        """See `Family.read_model_call`: channels behind the latents' are kept, `[B, C, H, W]`."""
        hidden, own = arguments["hidden_states"], PATCH**2 * shape[1]
        fill = self.unpack_latents(hidden[..., own:], shape)
        given = {**arguments, "hidden_states": hidden[..., :own], "fill": fill}
        return super().read_model_call(transformer, shape, given)

    def forward_arguments(
        self, latents: Tensor, level: Tensor, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `ForwardFamily.forward_arguments`."""
        prompt = dict(arguments)
        fill = smaller_both(prompt.pop("fill"), latents.shape[1], latents.shape[-2:])
        given = super().forward_arguments(latents, level, prompt)
        given["hidden_states"] = self.pack_latents(torch.cat((latents, fill), dim=1).contiguous())
        return given


def _tokens(shape: tuple[int, ...]) -> int:
    return shape[-2] * shape[-1] // PATCH**2
