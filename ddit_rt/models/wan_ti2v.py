"""Wan 2.2 TI2V 5B, image to video: `WanImageToVideoPipeline` with `expand_timesteps`.

Latents are `[B, 48, F, H/16, W/16]`. The first latent frame is the encoded image: it stays as it
is, and the model is told so by a timestep for each token, 0 in that frame and t in all others. A
coarse step has the tokens of its own grid, their timesteps, and a smaller image by plain means.
What the solver makes of the first frame is never seen, but by scores, as one of many frames: the
pipeline puts the image there before every call of the model, and at the end. Text to video, where
all tokens have one time, is `wan.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddit_rt.models.calls import ModelCall
from ddit_rt.models.smaller import smaller
from ddit_rt.models.wan_forward import WanForwardFamily


class WanTI2VFamily(WanForwardFamily):
    """Image to video by a timestep for each token."""

    name: ClassVar[str] = "wan-ti2v"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("WanImageToVideoPipeline",)
    pipeline_config: ClassVar[Mapping[str, Any]] = {"expand_timesteps": True}
    extra: ClassVar[tuple[str, ...]] = ("condition",)
    # A row for every token and step would be as large as the model.
    timed: ClassVar[tuple[str, ...]] = ()
    # Twice 121 frames of 704 x 1280. Six rows of 3072 for each token then stay below 2**31.
    default_ranges: ClassVar[Mapping[str, tuple[int, int]]] = {
        "batch": (1, 2),
        "image": (4, 54560),
    }

    def refused(self, config: Any) -> list[str]:
        """See `WanForwardFamily.refused`."""
        refused = []
        if config.in_channels != (config.out_channels or config.in_channels):
            refused.append(
                f"expand_timesteps, in_channels={config.in_channels} and "
                f"out_channels={config.out_channels} (expected as many)"
            )
        if config.image_dim is not None:
            refused.append("expand_timesteps and image embeddings (image_dim)")
        return refused

    def shapes(
        self, transformer: Any, variant: int, batch: int, text: int
    ) -> dict[str, tuple[int, ...]]:
        """See `Family.shapes`."""
        condition = (batch, transformer.config.in_channels, 1, 1, 1)
        return {**super().shapes(transformer, variant, batch, text), "condition": condition}

    def extra_size(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See `Family.extra_size`: one frame."""
        return 1, *shape[3:]

    def forward_arguments(
        self, latents: Tensor, level: Tensor, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Family.forward_arguments`."""
        prompt = dict(arguments)
        picture = smaller(prompt.pop("condition"), latents.shape[-2:])
        given = super().forward_arguments(latents, level, prompt)
        batch, _, frames, rows, columns = latents.shape
        tokens, time = rows * columns // self.patch**2, given["timestep"][:, None]
        first = torch.zeros_like(time).expand(batch, tokens)
        given["timestep"] = torch.cat((first, time.expand(batch, (frames - 1) * tokens)), dim=1)
        given["hidden_states"] = torch.cat((picture, latents[:, :, 1:]), dim=2)
        return given

    def ignored(
        self, pipeline: Any, given: Mapping[str, Any], call: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """See `Family.ignored`."""
        notes = super().ignored(pipeline, given, call)
        if call["last_image"] is None:
            return notes
        return *notes, "last_image is ignored by a model with a timestep for each token"

    def read_model_call(
        self, transformer: Any, shape: tuple[int, ...], arguments: Mapping[str, Any]
    ) -> ModelCall:
        """See `Family.read_model_call`: the last token's time is that of all but the image's."""
        given = {
            **arguments,
            "condition": arguments["hidden_states"][:, :, :1],
            "timestep": arguments["timestep"][:, -1],
        }
        return super().read_model_call(transformer, shape, given)
