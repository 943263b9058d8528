"""Wan VACE (2.1, 2.2): `WanVACETransformer3DModel` behind `WanVACEPipeline`.

A second chain of blocks runs over the tokens of a control video; what it gives is added to the
model's own tokens between blocks. Its channels are two encoded videos, what to keep and what to
change, and the mask between them, whose 8 x 8 pixels of a latent pixel are channels. All are clean:
a coarse step has smaller ones. Reference images are further frames at the front, which the
pipeline takes off again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ddit_rt.errors import ShapeError
from ddit_rt.models.calls import ModelCall, batch_of
from ddit_rt.models.smaller import smaller_both
from ddit_rt.models.wan_forward import WanForwardFamily

_CONTROL = "control_hidden_states"
_SCALE = "control_hidden_states_scale"


class WanVACEFamily(WanForwardFamily):
    """Videos by a control video, a mask and reference images."""

    name: ClassVar[str] = "wan-vace"
    transformer_class: ClassVar[str] = "WanVACETransformer3DModel"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("WanVACEPipeline",)
    held: ClassVar[tuple[str, ...]] = (*WanForwardFamily.held, "vace_patch_embedding")
    unbatched: ClassVar[tuple[str, ...]] = (_SCALE,)
    extra: ClassVar[tuple[str, ...]] = (_CONTROL,)

    def refused(self, config: Any) -> list[str]:
        """See `WanForwardFamily.refused`."""
        refused, own = [], config.in_channels
        if own != (config.out_channels or own):
            refused.append(f"in_channels={own} and out_channels={config.out_channels}")
        mask = config.vace_in_channels - 2 * own
        if mask < 1 or math.isqrt(mask) ** 2 != mask:
            refused.append(
                f"vace_in_channels={config.vace_in_channels} (expected those of two videos, "
                f"{2 * own}, and a square number of a mask)"
            )
        if config.image_dim is not None or config.added_kv_proj_dim is not None:
            refused.append("image embeddings (image_dim, added_kv_proj_dim)")
        if config.num_layers - 1 in config.vace_layers:
            refused.append("control behind the last block (vace_layers)")
        return refused

    def shapes(
        self, transformer: Any, variant: int, batch: int, text: int
    ) -> dict[str, tuple[int, ...]]:
        """See `Family.shapes`."""
        config = transformer.config
        return {
            **super().shapes(transformer, variant, batch, text),
            _CONTROL: (batch, config.vace_in_channels, 1, 1, 1),
            _SCALE: (len(config.vace_layers),),
        }

    def forward_arguments(
        self, latents: Tensor, level: Tensor, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Family.forward_arguments`."""
        control = smaller_both(arguments[_CONTROL], 2 * latents.shape[1], latents.shape[-2:])
        return super().forward_arguments(latents, level, {**arguments, _CONTROL: control})

    def call_shape(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
        """See `WanForwardFamily.call_shape`: each reference image is a latent frame."""
        if (videos := batch_of(call)) != 1:
            raise ValueError(
                f"got {videos} prompts or videos; WanVACEPipeline makes one video in a call: call "
                "it for each"
            )
        batch, channels, frames, *size = super().call_shape(pipeline, call)
        return batch, channels, frames + _references(call["reference_images"]), *size

    def read_model_call(
        self, transformer: Any, shape: tuple[int, ...], arguments: Mapping[str, Any]
    ) -> ModelCall:
        """See `Family.read_model_call`."""
        control = arguments[_CONTROL]
        if control.shape[2:] != shape[2:]:
            raise ShapeError(
                f"the control video is {list(control.shape[2:])} latent frames, rows and columns; "
                f"those of this call are {list(shape[2:])}: give `video` and `mask` as many frames "
                "and pixels as num_frames, height and width say"
            )
        return super().read_model_call(transformer, shape, arguments)


def _references(given: Any) -> int:
    """Reference images of a call, which may stand in a list, or in a list within one."""
    if not isinstance(given, (list, tuple)):
        return int(given is not None)
    inner = given[0] if given and isinstance(given[0], (list, tuple)) else given
    return len(inner)
