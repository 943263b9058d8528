"""FLUX.2 (dev, klein): `Flux2Transformer2DModel`, `Flux2Pipeline` and `Flux2KleinPipeline`.

Latents are `[B, 32, H/8, W/8]`. The pipeline packs 2 x 2 latent pixels into a token and batch
normalises the 128 channels of the packed latent: x0_n = (x0 - m) / s, with m and s for each channel
and each of the four places. Noise is white with std 1 *there*, z = (1 - t) x0_n + t n, and so a
coarse step unpacks and reduces z as it is:

- Noise stays white, with the std that `coarse.py` derives. Of s z it would have another in each
  place, and dividing by s again after the reduction would not undo that.
- The image is that of undoing the norm, reducing, and normalising again, for affine maps of a
  channel commute with every reduction that keeps constants; as long as the four places of a channel
  have one m and one s. They do but for sampling error, because the encoder is a convolution: in the
  released weights the four s of a channel are within about 1.5 % of their mean, the m within .02 s.

`check_model` holds the VAE against this. The tokens of reference images follow the image's; coarse
steps leave them as they are. dev has its guidance embedded; klein has none when
distilled, and two passes as a base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.base import TEXT
from ddit_rt.models.description import REFERENCE, REFERENCE_IDS
from ddit_rt.models.family import Family

_SPREAD = 0.1
"""Of a channel's std: how far its norm may differ between places; three times the released one."""


class Flux2Family(Family):
    """FLUX.2, text to image and edits by reference images."""

    name: ClassVar[str] = "flux2"
    transformer_class: ClassVar[str] = "Flux2Transformer2DModel"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("Flux2Pipeline", "Flux2KleinPipeline")
    prompt: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "encoder_hidden_states": (TEXT, "joint_attention_dim"),
        "guidance": (),
    }
    packed: ClassVar[bool] = True
    dtypes: ClassVar[Mapping[str, torch.dtype]] = {"guidance": torch.float32}
    held: ClassVar[tuple[str, ...]] = ("context_embedder", "pos_embed")
    timed: ClassVar[tuple[str, ...]] = (
        "time_guidance_embed",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
    )
    sized: ClassVar[tuple[str, ...]] = ("img_ids", "txt_ids")
    unbatched: ClassVar[tuple[str, ...]] = (REFERENCE_IDS,)
    extra: ClassVar[tuple[str, ...]] = (REFERENCE, REFERENCE_IDS)

    def check_model(self, transformer: nn.Module, pipeline: Any) -> None:
        """See `Family.check_model`."""
        vae = getattr(pipeline, "vae", None)
        if vae is None or vae.bn.running_var.is_meta:
            return
        std = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt().view(-1, 4)
        for one in (vae.bn.running_mean.float().view(-1, 4), std):
            if (spread := float(((one.amax(1) - one.amin(1)) / std.mean(1)).max())) > _SPREAD:
                raise UnsupportedModelError(
                    f"the batch norm of this {type(vae).__name__} differs by {spread:.2g} std "
                    "between the four places of a packed channel, where a coarse image needs "
                    f"less than {_SPREAD}; load the VAE that belongs to the model"
                )

    def resized(self, arguments: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """See `Family.resized`: frame, row, column and text position of every token."""
        text = arguments[self.text]
        rows, columns = shape[-2] // self.patch, shape[-1] // self.patch
        sizes = {"img_ids": (1, rows, columns, 1), "txt_ids": (1, 1, 1, text.shape[1])}
        arange = partial(torch.arange, device=text.device)
        return {name: torch.cartesian_prod(*map(arange, size)) for name, size in sizes.items()}

    def scale_of(self, pipeline: Any, call: Mapping[str, Any]) -> float | None:
        """See `Family.scale_of`: of klein as a base model."""
        two = "negative_prompt_embeds" in call and not pipeline.config.is_distilled
        return float(call["guidance_scale"]) if two and call["guidance_scale"] > 1 else None

    def size_of(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, int]:
        """See `Family.size_of`: by default of the first reference image."""
        image = call["image"]
        if image is None:
            return super().size_of(pipeline, call)
        processor, first = pipeline.image_processor, image[0] if isinstance(image, list) else image
        columns, rows = processor._resize_if_exceeds_area(processor.check_image_input(first)).size
        unit = pipeline.vae_scale_factor * self.patch
        # As the pipeline has it, 0 is no size either.
        return call["height"] or rows // unit * unit, call["width"] or columns // unit * unit

    def mu(self, scheduler: Any, tokens: int, steps: int) -> float:
        """See `Family.mu`."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return float(compute_empirical_mu(tokens, steps))

    def given_latents(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See `Family.given_latents`: packed, in rows and columns."""
        batch, channels, rows, columns = shape
        return batch, channels * self.patch**2, rows // self.patch, columns // self.patch
