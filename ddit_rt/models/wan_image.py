"""Wan image to video (2.1, 2.2 A14B): `WanTransformer3DModel` behind `WanImageToVideoPipeline`.

The model sees `[B, 16 + 20, F, H/8, W/8]`: latents, then the mask of given frames and the encoded
images. Only the latents carry noise, so a coarse step makes the other channels smaller by plain
means, without the scale that belongs to noise. Wan 2.2 A14B has two experts, as for text to video.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.calls import ModelCall
from ddit_rt.models.smaller import smaller
from ddit_rt.models.wan_forward import WanForwardFamily

_MASK = 4
"""Channels of the mask: one for each frame that a latent frame stands for."""

_IMAGE = "encoder_hidden_states_image"
_IMAGE_TOKENS = 257
"""Of one image."""

_EMBEDDED_TEXT = 512
"""Text tokens that the attention of a model with image embeddings takes for granted."""


class WanImageFamily(WanForwardFamily):
    """Image to video, from the first frame or from the first and the last."""

    name: ClassVar[str] = "wan-image"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("WanImageToVideoPipeline",)
    extra: ClassVar[tuple[str, ...]] = ("condition",)

    def refused(self, config: Any) -> list[str]:
        """See `WanForwardFamily.refused`."""
        expected, pictures = 2 * config.out_channels + _MASK, config.pos_embed_seq_len
        refused = []
        if config.in_channels != expected:
            refused.append(f"in_channels={config.in_channels} (expected {expected})")
        if pictures not in (None, 2 * _IMAGE_TOKENS):
            refused.append(f"pos_embed_seq_len={pictures} (expected {2 * _IMAGE_TOKENS})")
        return refused

    def shapes(
        self, transformer: Any, variant: int, batch: int, text: int
    ) -> dict[str, tuple[int, ...]]:
        """See `Family.shapes`."""
        config = transformer.config
        embedded = config.image_dim is not None
        given = super().shapes(transformer, variant, batch, _EMBEDDED_TEXT if embedded else text)
        given["condition"] = (batch, config.in_channels - config.out_channels, 1, 1, 1)
        if embedded:
            tokens = config.pos_embed_seq_len or _IMAGE_TOKENS
            given[_IMAGE] = (batch, tokens, config.image_dim)
        return given

    def forward_arguments(
        self, latents: Tensor, level: Tensor, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Family.forward_arguments`."""
        prompt = dict(arguments)
        condition = smaller(prompt.pop("condition"), latents.shape[-2:])
        image = prompt.get(_IMAGE)
        if image is not None and image.shape[1] > _IMAGE_TOKENS:
            # The model takes the two images of a video as two rows.
            prompt[_IMAGE] = image.unflatten(1, (2, _IMAGE_TOKENS)).flatten(0, 1)
        given = super().forward_arguments(latents, level, prompt)
        condition = condition.expand(-1, -1, latents.shape[2], -1, -1)  # an example has one frame
        given["hidden_states"] = torch.cat((latents, condition), dim=1)
        return given

    def no_output(self, given: Mapping[str, Any]) -> Tensor:
        """See `Family.no_output`: without the channels of mask and images."""
        hidden = given["hidden_states"]
        return torch.zeros_like(hidden[:, : (hidden.shape[1] - _MASK) // 2])

    def check_prompts(self, pipeline: Any, call: Mapping[str, Any]) -> None:
        """See `Family.check_prompts`."""
        config = pipeline.transformer.config
        if config.image_dim is not None:
            _check_text(call, guided=bool(self.scales_of(pipeline, call)))
            _check_pictures(call, 1 if config.pos_embed_seq_len is None else 2)
        super().check_prompts(pipeline, call)

    def read_model_call(
        self, transformer: Any, shape: tuple[int, ...], arguments: Mapping[str, Any]
    ) -> ModelCall:
        """See `Family.read_model_call`: channels behind the latents' are kept."""
        hidden, own = arguments["hidden_states"], shape[1]
        given = {**arguments, "hidden_states": hidden[:, :own], "condition": hidden[:, own:]}
        image, config = given.get(_IMAGE), transformer.config
        if image is not None and config.pos_embed_seq_len is not None:
            given[_IMAGE] = image.unflatten(0, (-1, 2)).flatten(1, 2)
        return super().read_model_call(transformer, shape, given)


def _check_text(call: Mapping[str, Any], *, guided: bool) -> None:
    """Refuses prompts of other lengths than the attention takes for granted."""
    embeds = [call["prompt_embeds"], *([call["negative_prompt_embeds"]] if guided else [])]
    lengths = {call["max_sequence_length"] if one is None else one.shape[1] for one in embeds}
    if lengths != {_EMBEDDED_TEXT}:
        raise UnsupportedModelError(
            f"got prompts of {sorted(lengths)} tokens (max_sequence_length, or the embeddings' own "
            f"length); the attention of a model with image embeddings takes {_EMBEDDED_TEXT} for "
            "granted: leave max_sequence_length out, and pad embeddings with zeros"
        )


def _check_pictures(call: Mapping[str, Any], expected: int) -> None:
    """Refuses another number of images than the model has image embeddings of."""
    given = 1 + (call["last_image"] is not None)
    if call["image_embeds"] is None and given != expected:
        raise ValueError(
            f"got {given} image(s) for a model with image embeddings of {expected}; "
            + ("give `last_image` too" if expected > given else "leave `last_image` out")
        )
