"""Qwen-Image, Qwen-Image-Edit: `QwenImageTransformer2DModel` behind its pipelines.

Latents are `[B, 16, H/8, W/8]`; the pipeline packs 2 x 2 latent pixels into a token, as FLUX's
does. Positions are centred on the image and made by the model from its shape. Prompts of unequal
lengths are padded, and come with a mask then: attention with a mask is another package. True
guidance keeps the length of every token's velocity with the prompt. The images to edit follow the
latents as tokens of their own; coarse steps leave those as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.base import TEXT
from ddit_rt.models.description import REFERENCE, REFERENCE_SHAPES
from ddit_rt.models.family import Family


class QwenImageFamily(Family):
    """Qwen-Image, text to image and edits."""

    name: ClassVar[str] = "qwen-image"
    transformer_class: ClassVar[str] = "QwenImageTransformer2DModel"
    pipeline_classes: ClassVar[tuple[str, ...]] = (
        "QwenImagePipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
    )
    prompt: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "encoder_hidden_states": (TEXT, "joint_attention_dim")
    }
    packed: ClassVar[bool] = True
    default_ranges: ClassVar[Mapping[str, tuple[int, int]]] = {"text": (1, 1024)}
    held: ClassVar[tuple[str, ...]] = ("txt_norm", "txt_in", "pos_embed")
    timed: ClassVar[tuple[str, ...]] = ("time_text_embed",)
    sized: ClassVar[tuple[str, ...]] = ("img_shapes",)
    variants: ClassVar[int] = 2
    dtypes: ClassVar[Mapping[str, torch.dtype]] = {"encoder_hidden_states_mask": torch.bool}

    def check_model(self, transformer: Any, pipeline: Any) -> None:
        """See `Family.check_model`."""
        if transformer.config.get("zero_cond_t", False):
            raise UnsupportedModelError(
                "got a QwenImageTransformer2DModel with zero_cond_t, as Qwen-Image-Edit-2511 has: "
                "its blocks take the times of image and references side by side, and packages "
                "know no such dimension; call the diffusers pipeline itself"
            )

    def size_of(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, int]:
        """See `Family.size_of`: of an edit by its first or last image."""
        image = call.get("image")
        if image is None:
            return super().size_of(pipeline, call)
        kind = type(pipeline)
        if isinstance(image, list):
            image = image[-1 if kind.__name__ == "QwenImageEditPlusPipeline" else 0]
        ratio = image.size[0] / image.size[1]
        columns, rows, *_ = sys.modules[kind.__module__].calculate_dimensions(1024 * 1024, ratio)
        height, width = call["height"], call["width"]
        return int(rows if height is None else height), int(columns if width is None else width)

    def shapes(
        self, transformer: Any, variant: int, batch: int, text: int
    ) -> dict[str, tuple[int, ...]]:
        """See `Family.shapes`: without a text mask, and with one."""
        mask = {"encoder_hidden_states_mask": (batch, text)} if variant else {}
        return {**super().shapes(transformer, variant, batch, text), **mask}

    def prompt_names(self, transformer: nn.Module) -> tuple[str, ...]:
        """See `Family.prompt_names`: images to edit, too."""
        return *super().prompt_names(transformer), REFERENCE, REFERENCE_SHAPES

    def resized(self, arguments: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """See `Family.resized`."""
        rows, columns = shape[-2] // self.patch, shape[-1] // self.patch
        references = arguments.get(REFERENCE_SHAPES, ())
        return {"img_shapes": [[(1, rows, columns), *references]] * shape[0]}

    def reference_places(self, arguments: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """See `Family.reference_places`: the model makes positions of shapes."""
        return {REFERENCE_SHAPES: tuple(arguments["img_shapes"][0][1:])}

    def scale_of(self, pipeline: Any, call: Mapping[str, Any]) -> float | None:
        """See `Family.scale_of`: true guidance, with a negative prompt."""
        negative = call["negative_prompt"] is not None or call["negative_prompt_embeds"] is not None
        scale = float(call["true_cfg_scale"])
        return scale if scale > 1 and negative else None

    def join(self, prompt: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
        """See `Family.join`: every token as long as with the prompt."""
        joined = super().join(prompt, negative, scale)
        length = torch.norm(prompt, dim=-1, keepdim=True)
        rescaled: Tensor = joined * (length / torch.norm(joined, dim=-1, keepdim=True))
        return rescaled
