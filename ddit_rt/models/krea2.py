"""Krea 2: `Krea2Transformer2DModel` behind `Krea2Pipeline`.

Latents are `[B, 16, H/8, W/8]`; the pipeline packs 2 x 2 latent pixels into a token, as FLUX's
does. Blocks take text and image as one sequence. The prompt comes as hidden states of several
layers of the text encoder, which a small transformer fuses, and always with a mask, as the pipeline
pads it. Guidance is v = p + w (p - n): that with the usual scale 1 + w.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.base import TEXT
from ddit_rt.models.calls import PipelineCall
from ddit_rt.models.family import Family

_MASK = "encoder_attention_mask"
_DISTILLED_SHIFT = 1.15


class Krea2Family(Family):
    """Krea 2, text to image: the base model, and the few-step distilled one."""

    name: ClassVar[str] = "krea2"
    transformer_class: ClassVar[str] = "Krea2Transformer2DModel"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("Krea2Pipeline",)
    prompt: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "encoder_hidden_states": (TEXT, "num_text_layers", "text_hidden_dim"),
        _MASK: (TEXT,),
    }
    packed: ClassVar[bool] = True
    shifts: ClassVar[tuple[float, float, float, float]] = (256, 6400, 0.5, _DISTILLED_SHIFT)
    guided_by_default: ClassVar[bool] = True
    held: ClassVar[tuple[str, ...]] = ("text_fusion", "txt_in", "rotary_emb")
    timed: ClassVar[tuple[str, ...]] = ("time_embed", "time_mod_proj")
    sized: ClassVar[tuple[str, ...]] = ("position_ids",)
    dtypes: ClassVar[Mapping[str, torch.dtype]] = {_MASK: torch.bool}
    masks: ClassVar[Mapping[str, str]] = {"prompt_embeds_mask": _MASK}

    def check_model(self, transformer: Any, pipeline: Any) -> None:
        """See `Family.check_model`."""
        patch = self.patch if pipeline is None else pipeline.config.patch_size
        if patch != self.patch:
            raise UnsupportedModelError(f"got patch_size={patch}; Krea 2 runs at {self.patch} only")

    def size_of(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, int]:
        """See `Family.size_of`: rounded up to whole tokens."""
        unit = pipeline.vae_scale_factor * self.patch
        rows, columns = (-(-side // unit) * unit for side in super().size_of(pipeline, call))
        return rows, columns

    def resized(self, arguments: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """See `Family.resized`: text at the origin, then rows and columns."""
        text = arguments[self.text]
        ids = self.image_ids(shape, torch.float32, text)
        return {"position_ids": torch.cat((ids.new_zeros(text.shape[1], 3), ids))}

    def time(self, level: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Family.time`: the pipeline rounds t itself, not 1000 t."""
        return level.to(dtype)

    def scale_of(self, pipeline: Any, call: Mapping[str, Any]) -> float | None:
        """See `Family.scale_of`: the usual scale is the pipeline's plus 1."""
        scale = float(call["guidance_scale"])
        return 1 + scale if scale > 0 else None

    def join(self, prompt: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
        """See `Family.join`: as the pipeline writes it, for the same rounding."""
        return prompt + (scale - 1) * (prompt - negative)

    def read_call(
        self, pipeline: Any, scheduler: Any, arguments: Mapping[str, Any]
    ) -> PipelineCall:
        """See `Family.read_call`. A distilled model's shift is the same at every size."""
        if pipeline.config.is_distilled:
            scheduler.register_to_config(base_shift=_DISTILLED_SHIFT, max_shift=_DISTILLED_SHIFT)
        return super().read_call(pipeline, scheduler, arguments)
