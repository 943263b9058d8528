"""Chroma: `ChromaTransformer2DModel` behind `ChromaPipeline`.

Latents are `[B, 16, H/8, W/8]`; the pipeline packs 2 x 2 latent pixels into a token, as FLUX's
does, and positions are FLUX's. One network makes the modulation of all blocks from the time alone.
Prompts are padded to one length and always come with a mask, which the pipeline extends over the
image; it holds ones and zeros in the model's dtype, as the pipeline's own encoder makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ddit_rt.models.base import TEXT
from ddit_rt.models.calls import ModelCall
from ddit_rt.models.family import Family


class ChromaFamily(Family):
    """Chroma, text to image."""

    name: ClassVar[str] = "chroma"
    transformer_class: ClassVar[str] = "ChromaTransformer2DModel"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("ChromaPipeline",)
    prompt: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "encoder_hidden_states": (TEXT, "joint_attention_dim"),
        "attention_mask": (TEXT,),
    }
    packed: ClassVar[bool] = True
    guided_by_default: ClassVar[bool] = True
    held: ClassVar[tuple[str, ...]] = ("context_embedder", "pos_embed")
    timed: ClassVar[tuple[str, ...]] = ("time_text_embed", "distilled_guidance_layer")
    sized: ClassVar[tuple[str, ...]] = ("img_ids", "txt_ids")
    masks: ClassVar[Mapping[str, str]] = {"prompt_attention_mask": "attention_mask"}

    def resized(self, arguments: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """See `Family.resized`; the prompt's mask too, open to the image."""
        text, mask = arguments["encoder_hidden_states"], arguments["attention_mask"]
        ids = self.image_ids(shape, text.dtype, text)
        return {
            "img_ids": ids,
            "txt_ids": text.new_zeros(text.shape[1], 3),
            "attention_mask": torch.cat((mask, mask.new_ones(len(mask), len(ids))), dim=1),
        }

    def read_model_call(
        self, transformer: nn.Module, shape: tuple[int, ...], arguments: Mapping[str, Any]
    ) -> ModelCall:
        """See `Family.read_model_call`. Of the mask the part of the prompt."""
        call = super().read_model_call(transformer, shape, arguments)
        text, mask = (call.conditioning[name] for name in self.prompt)
        call.conditioning["attention_mask"] = mask[:, : text.shape[1]]
        return call
