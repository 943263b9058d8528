"""What Wan's families that start from pictures or videos share; see `wan_image.py`.

The model's own forward runs their steps. `wan.py`, the text-to-video family, tells its layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.base import Grid
from ddit_rt.models.calls import PipelineCall, batch_of, bind_call, check_shape, refuse_ignored
from ddit_rt.models.forward import ForwardFamily
from ddit_rt.models.wan import WanFamily
from ddit_rt.models.wan_calls import WanSizes, ignored_arguments, scales_of_call
from ddit_rt.models.wan_variants import refused_experts

_TEXT_TO_VIDEO = WanFamily()


class WanForwardFamily(WanSizes, ForwardFamily):
    """One transformer, or two experts that take turns."""

    transformer_class: ClassVar[str] = "WanTransformer3DModel"
    video: ClassVar[bool] = True
    guided_by_default: ClassVar[bool] = True
    default_ranges: ClassVar[Mapping[str, tuple[int, int]]] = _TEXT_TO_VIDEO.default_ranges
    held: ClassVar[tuple[str, ...]] = (
        "rope",
        "condition_embedder.text_embedder",
        "condition_embedder.image_embedder",
    )
    timed: ClassVar[tuple[str, ...]] = ("condition_embedder.time_embedder",)

    def check_model(self, transformer: Any, pipeline: Any) -> None:
        """Refuses what this version cannot run, by name."""
        refused = self.refused(transformer.config)
        if tuple(transformer.config.patch_size) != (1, 2, 2):
            patch = tuple(transformer.config.patch_size)
            refused.append(f"patch_size={patch} (expected (1, 2, 2))")
        if pipeline is not None:
            refused += refused_experts(transformer, pipeline)
        if refused:
            raise UnsupportedModelError(
                f"this version runs no {self.pipeline_classes[0]} of a model with "
                f"{'; '.join(refused)}; call the diffusers pipeline itself"
            )

    @abstractmethod
    def refused(self, config: Any) -> list[str]:
        """What a transformer has that this family cannot run, each in a few words."""

    @abstractmethod
    def shapes(self, config: Any, batch: int, text: int) -> dict[str, tuple[int, ...]]:
        """Of what carries the prompt; pictures and videos of one pixel serve every size."""

    def example(self, transformer: Any, variant: int, batch: int, text: int) -> dict[str, Any]:
        """See `ForwardFamily.example`."""
        return {
            name: torch.empty(shape, dtype=transformer.dtype, device="meta")
            for name, shape in self.shapes(transformer.config, batch, text).items()
        }

    def experts(self, pipeline: Any) -> tuple[nn.Module, ...]:
        """See `WanFamily.experts`."""
        return _TEXT_TO_VIDEO.experts(pipeline)

    def expert_steps(self, pipeline: Any, scheduler: Any) -> tuple[int, ...]:
        """See `WanFamily.expert_steps`."""
        return _TEXT_TO_VIDEO.expert_steps(pipeline, scheduler)

    def latent_channels(self, transformer: Any) -> int:
        """Those that carry noise."""
        config = transformer.config
        return int(config.out_channels or config.in_channels)

    def time(self, level: Tensor, dtype: torch.dtype) -> Tensor:
        """See `ForwardFamily.time`: 1000 t, in float64 as schedulers may give whole timesteps."""
        return (level.double() * 1000).float()

    def level_of(self, timestep: Tensor) -> Tensor:
        """See `ForwardFamily.level_of`."""
        return timestep.double() / 1000

    def scale_of(self, pipeline: Any, call: Mapping[str, Any]) -> float | None:
        """See `ForwardFamily.scale_of`: of the first expert."""
        scales = scales_of_call(pipeline, call)
        return scales[0] if scales else None

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
        shape = self.call_shape(pipeline, call)
        if call["latents"] is not None:
            check_shape("latents", call["latents"], shape)
        grid = Grid(frames=shape[2], height=shape[3] // self.patch, width=shape[4] // self.patch)
        self.set_timesteps(scheduler, call["num_inference_steps"], None, grid)
        scales = scales_of_call(pipeline, call)
        return PipelineCall(
            arguments=call,
            shape=shape,
            scales=scales,
            passes=1 + bool(scales),
            ignored=ignored_arguments(call),
        )

    def call_shape(self, pipeline: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
        """Latent shape of a pipeline's call."""
        size = call["height"], call["width"]
        return self.latent_shape(pipeline, *size, batch_of(call), call["num_frames"])
