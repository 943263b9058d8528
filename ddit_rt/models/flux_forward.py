"""What all pipelines of FLUX.1 share: `FluxTransformer2DModel`, and latents that they pack.

Latents are `[B, 16, H/8, W/8]`; the pipelines pack 2 x 2 latent pixels into a token before they
call the model, so the base patch p is 2 although the model's own `patch_size` is 1. The model was
trained on images of several sizes with rotary positions 0, 1, 2, ... in each direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.arguments import is_empty
from ddit_rt.models.base import TEXT
from ddit_rt.models.family import Family

_EMBEDS = {
    "prompt_embeds": "encoder_hidden_states",
    "pooled_prompt_embeds": "pooled_projections",
}


class FluxForwardFamily(Family):
    """One transformer, and true guidance with a negative prompt."""

    transformer_class: ClassVar[str] = "FluxTransformer2DModel"
    prompt: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "encoder_hidden_states": (TEXT, "joint_attention_dim"),
        "pooled_projections": ("pooled_projection_dim",),
        "guidance": (),
    }
    packed: ClassVar[bool] = True
    held: ClassVar[tuple[str, ...]] = ("context_embedder", "pos_embed")
    timed: ClassVar[tuple[str, ...]] = ("time_text_embed",)
    sized: ClassVar[tuple[str, ...]] = ("img_ids", "txt_ids")
    embeds: ClassVar[Mapping[str, str]] = _EMBEDS

    def check_model(self, transformer: Any, pipeline: Any) -> None:
        """Refuses a model with channels that the pipeline does not fill."""
        del pipeline
        config = transformer.config
        if (config.out_channels or config.in_channels) != config.in_channels:
            raise UnsupportedModelError(
                f"got a transformer of in_channels={config.in_channels} and out_channels="
                f"{config.out_channels} for {self.pipeline_classes[0]}, which takes as many as it "
                "gives; put one with further channels into a pipeline that fills them: compile a "
                "FluxFillPipeline"
            )

    def latent_channels(self, transformer: Any) -> int:
        """The model's `out_channels` count the packed ones."""
        config = transformer.config
        return int(config.out_channels or config.in_channels) // self.patch**2

    def resized(self, arguments: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """See `Family.resized`: text tokens all sit at (0, 0, 0)."""
        text = arguments["encoder_hidden_states"]
        ids = self.image_ids(shape, torch.float32, text)
        return {"img_ids": ids, "txt_ids": torch.zeros_like(ids[:1]).repeat(text.shape[1], 1)}

    def scale_of(self, pipeline: Any, call: Mapping[str, Any]) -> float | None:
        """See `Family.scale_of`: true guidance, with a negative prompt."""
        scale = float(call["true_cfg_scale"])
        if scale <= 1:
            return None
        embeds = (call["negative_prompt_embeds"], call["negative_pooled_prompt_embeds"])
        if call["negative_prompt"] is None and any(tensor is None for tensor in embeds):
            raise ValueError(
                f"got true_cfg_scale={scale} without a negative prompt, which would be ignored; "
                "pass negative_prompt, or leave true_cfg_scale at 1"
            )
        return scale

    def ignored(
        self, pipeline: Any, given: Mapping[str, Any], call: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """See `Family.ignored`."""
        notes = []
        # A callback may read it.
        unread = given.get("callback_on_step_end") is None
        distilled = pipeline.transformer.config.guidance_embeds
        if not distilled and unread and given.get("guidance_scale"):
            notes.append(
                f"guidance_scale={given['guidance_scale']:g} is ignored: this model was made "
                "without guidance embeddings (guidance_embeds=False)"
            )
        if "true_cfg_scale" not in given:  # at 1 or below, the caller has turned it off
            notes += [
                f"{name} is ignored without a true_cfg_scale above 1"
                for name in (f"negative_{name}" for name in ("prompt", "prompt_2", *_EMBEDS))
                if not is_empty(given.get(name))
            ]
        return tuple(notes)
