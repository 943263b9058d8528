"""Qwen-Image (and -2512): `QwenImageTransformer2DModel` behind `QwenImagePipeline`.

Latents are `[B, 16, H/8, W/8]`; the pipeline packs 2 x 2 latent pixels into a token, as FLUX's
does. Positions are centred on the picture and made by the model from its shape. Prompts of unequal
lengths are padded, and come with a mask then: attention with a mask is another package. True
guidance keeps the length of every token's velocity with the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddit_rt import ops
from ddit_rt.models.forward import ForwardFamily


class QwenImageFamily(ForwardFamily):
    """Qwen-Image, text to image."""

    name: ClassVar[str] = "qwen-image"
    transformer_class: ClassVar[str] = "QwenImageTransformer2DModel"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    conditioning_names: ClassVar[tuple[str, ...]] = (
        "encoder_hidden_states",
        "encoder_hidden_states_mask",
    )
    default_ranges: ClassVar[Mapping[str, tuple[int, int]]] = {"text": (1, 1024)}
    held: ClassVar[tuple[str, ...]] = ("txt_norm", "txt_in", "pos_embed")
    timed: ClassVar[tuple[str, ...]] = ("time_text_embed",)
    sized: ClassVar[tuple[str, ...]] = ("img_shapes",)
    variants: ClassVar[int] = 2

    def latent_channels(self, transformer: Any) -> int:
        """`in_channels` counts the packed channels."""
        return int(transformer.config.in_channels) // self.patch**2

    def example(self, transformer: Any, variant: int, batch: int, text: int) -> dict[str, Any]:
        """See `ForwardFamily.example`: without a text mask, and with one."""
        width, dtype = transformer.config.joint_attention_dim, transformer.dtype
        arguments: dict[str, Any] = {
            "encoder_hidden_states": torch.empty(batch, text, width, dtype=dtype, device="meta")
        }
        if variant:
            mask = torch.empty(batch, text, dtype=torch.bool, device="meta")
            arguments["encoder_hidden_states_mask"] = mask
        return arguments

    def resized(self, arguments: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """See `ForwardFamily.resized`."""
        rows, columns = shape[-2] // self.patch, shape[-1] // self.patch
        return {"img_shapes": [[(1, rows, columns)]] * shape[0]}

    def scale_of(self, pipeline: Any, call: Mapping[str, Any]) -> float | None:
        """See `ForwardFamily.scale_of`: true guidance, with a negative prompt."""
        negative = call["negative_prompt"] is not None or call["negative_prompt_embeds"] is not None
        scale = float(call["true_cfg_scale"])
        return scale if scale > 1 and negative else None

    def join(self, prompt: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
        """See `ForwardFamily.join`: every token as long as with the prompt."""
        joined = super().join(prompt, negative, scale)
        length = torch.norm(prompt, dim=-1, keepdim=True)
        rescaled: Tensor = joined * (length / torch.norm(joined, dim=-1, keepdim=True))
        return rescaled

    def pack_latents(self, latents: Tensor) -> Tensor:
        """Packed tokens `[B, n, 4C]`."""
        return ops.pack(latents, self.patch)

    def unpack_latents(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """See `Family.unpack_latents`."""
        return ops.unpack(latents.contiguous(), self.patch, shape[-2], shape[-1])
