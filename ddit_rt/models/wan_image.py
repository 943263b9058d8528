"""Wan 2.1 image to video: `WanTransformer3DModel` behind `WanImageToVideoPipeline`.

The model sees `[B, 16 + 20, F, H/8, W/8]`: latents, then the mask of given frames and the encoded
picture. Only the latents carry noise, so a coarse step makes the other channels smaller by plain
means, without the scale that belongs to noise. `wan.py` is the text-to-video family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.base import Grid
from ddit_rt.models.calls import (
    ModelCall,
    PipelineCall,
    batch_of,
    bind_call,
    check_shape,
    refuse_ignored,
)
from ddit_rt.models.forward import ForwardFamily
from ddit_rt.models.wan import WanFamily
from ddit_rt.models.wan_calls import default_of, latent_size

_TEXT = 512
"""Text tokens that the attention of a model with image embeddings takes for granted."""

_MASK = 4
"""Channels of the mask: one for each frame that a latent frame stands for."""

_TEXT_TO_VIDEO = WanFamily()


class WanImageFamily(ForwardFamily):
    """Image to video with one transformer."""

    name: ClassVar[str] = "wan-image"
    transformer_class: ClassVar[str] = "WanTransformer3DModel"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("WanImageToVideoPipeline",)
    conditioning_names: ClassVar[tuple[str, ...]] = (
        "encoder_hidden_states",
        "encoder_hidden_states_image",
        "condition",
    )
    video: ClassVar[bool] = True
    guided_by_default: ClassVar[bool] = True
    default_ranges: ClassVar[Mapping[str, tuple[int, int]]] = _TEXT_TO_VIDEO.default_ranges
    held: ClassVar[tuple[str, ...]] = ("rope", "condition_embedder.text_embedder")
    timed: ClassVar[tuple[str, ...]] = ("condition_embedder.time_embedder",)
    extra: ClassVar[tuple[str, ...]] = ("condition",)

    def check_model(self, transformer: Any, pipeline: Any) -> None:
        """Refuses what this version cannot run, by name."""
        config, refused = transformer.config, []
        if tuple(config.patch_size) != (1, 2, 2):
            refused.append(f"patch_size={tuple(config.patch_size)} (expected (1, 2, 2))")
        if pipeline is not None and pipeline.config.boundary_ratio is not None:
            refused.append("two experts (boundary_ratio of Wan 2.2 A14B)")
        if pipeline is not None and pipeline.config.expand_timesteps:
            refused.append(
                "a timestep per token (expand_timesteps of Wan 2.2 TI2V 5B): given frames have "
                "another noise level than the rest, and a coarse step has one level"
            )
        elif config.in_channels != 2 * config.out_channels + _MASK:
            expected = 2 * config.out_channels + _MASK
            refused.append(f"in_channels={config.in_channels} (expected {expected})")
        if refused:
            raise UnsupportedModelError(
                f"this version runs no Wan image-to-video model with {'; '.join(refused)}; call "
                "the diffusers pipeline itself"
            )

    def latent_channels(self, transformer: Any) -> int:
        """Those that carry noise."""
        return int(transformer.config.out_channels)

    def example(self, transformer: Any, variant: int, batch: int, text: int) -> dict[str, Any]:
        """See `ForwardFamily.example`: a condition of one pixel serves every size."""
        config = transformer.config
        shapes: dict[str, tuple[int, ...]] = {
            "encoder_hidden_states": (batch, text, config.text_dim),
            "condition": (batch, config.in_channels - config.out_channels, 1, 1, 1),
        }
        if config.image_dim is not None:
            shapes["encoder_hidden_states"] = (batch, _TEXT, config.text_dim)
            shapes["encoder_hidden_states_image"] = (batch, 257, config.image_dim)
        return {
            name: torch.empty(shape, dtype=transformer.dtype, device="meta")
            for name, shape in shapes.items()
        }

    def resized(self, arguments: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """See `ForwardFamily.resized`: the model makes positions itself."""
        return {}

    def forward_arguments(
        self, latents: Tensor, level: Tensor, arguments: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `ForwardFamily.forward_arguments`."""
        prompt = dict(arguments)
        condition = prompt.pop("condition")
        if condition.shape[2:] != latents.shape[2:]:
            condition = F.interpolate(condition, tuple(latents.shape[2:]), mode="area")
        given = super().forward_arguments(latents, level, prompt)
        given["hidden_states"] = torch.cat((latents, condition), dim=1)
        return given

    def time(self, level: Tensor, dtype: torch.dtype) -> Tensor:
        """See `ForwardFamily.time`: 1000 t."""
        return level * 1000

    def level_of(self, timestep: Tensor) -> Tensor:
        """See `ForwardFamily.level_of`."""
        return timestep.float() / 1000

    def no_output(self, given: Mapping[str, Any]) -> Tensor:
        """See `ForwardFamily.no_output`: without the channels of mask and picture."""
        hidden = given["hidden_states"]
        return torch.zeros_like(hidden[:, : self._channels(hidden)])

    @staticmethod
    def _channels(hidden: Tensor) -> int:
        """Latent channels C, of C + C and those of the mask."""
        return (hidden.shape[1] - _MASK) // 2

    def scale_of(self, pipeline: Any, call: Mapping[str, Any]) -> float | None:
        """See `ForwardFamily.scale_of`."""
        scale = float(call["guidance_scale"])
        return scale if scale > 1 else None

    def default_size(self, pipeline: Any) -> tuple[int, int]:
        """480 x 832, as the pipeline's call has it."""
        return default_of(pipeline, "height"), default_of(pipeline, "width")

    def default_frames(self, pipeline: Any) -> int | None:
        """81, as the pipeline's call has it."""
        return default_of(pipeline, "num_frames")

    def latent_shape(
        self, pipeline: Any, height: int, width: int, batch: int, num_frames: int | None = None
    ) -> tuple[int, ...]:
        """See `WanFamily.latent_shape`."""
        channels = self.latent_channels(pipeline.transformer)
        return batch, channels, *latent_size(pipeline, height, width, num_frames)

    def set_timesteps(
        self, scheduler: Any, num_inference_steps: int, sigmas: Sequence[float] | None, grid: Grid
    ) -> None:
        """See `WanFamily.set_timesteps`."""
        _TEXT_TO_VIDEO.set_timesteps(scheduler, num_inference_steps, sigmas, grid)

    def read_call(
        self, pipeline: Any, scheduler: Any, arguments: Mapping[str, Any]
    ) -> PipelineCall:
        """See `ForwardFamily.read_call`."""
        call = bind_call(pipeline, arguments)
        refuse_ignored(call)
        tokens = call["max_sequence_length"]
        fixed = pipeline.transformer.config.image_dim is not None
        if fixed and call["prompt_embeds"] is None and tokens != _TEXT:
            raise UnsupportedModelError(
                f"got max_sequence_length={tokens}; the attention of a model with image embeddings "
                f"takes {_TEXT} text tokens: leave it out"
            )
        size = (call["height"], call["width"])
        shape = self.latent_shape(pipeline, *size, batch_of(call), call["num_frames"])
        if call["latents"] is not None:
            check_shape("latents", call["latents"], shape)
        grid = Grid(frames=shape[2], height=shape[3] // 2, width=shape[4] // 2)
        self.set_timesteps(scheduler, call["num_inference_steps"], None, grid)
        scale = self.scale_of(pipeline, call)
        scales = () if scale is None else (scale,)
        return PipelineCall(arguments=call, shape=shape, scales=scales, passes=1 + len(scales))

    def read_model_call(
        self, transformer: nn.Module, shape: tuple[int, ...], arguments: Mapping[str, Any]
    ) -> ModelCall:
        """See `Family.read_model_call`: channels behind the latents' are kept."""
        hidden, own = arguments["hidden_states"], shape[1]
        given = {**arguments, "hidden_states": hidden[:, :own], "condition": hidden[:, own:]}
        return super().read_model_call(transformer, shape, given)

    def pack_latents(self, latents: Tensor) -> Tensor:
        """The latents as they are."""
        return latents

    def unpack_latents(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The latents as they are."""
        return latents
