"""Wan text-to-video (2.1, 2.2 A14B and TI2V 5B): `WanTransformer3DModel` behind `WanPipeline`.

Latents are `[B, 16, F, H/8, W/8]` for 4F - 3 frames, and a token is 2 x 2 latent pixels of one
frame, so a coarse patch is 4 x 4 or 8 x 8 pixels of one frame. Rotary positions count frames, rows
and columns; text enters by cross-attention, which no patch size touches. The modulation input of a
step is seven rows of d: six for the blocks, one for the output norm.

Wan 2.2 A14B has two models of one shape: `transformer` takes the steps whose timestep is at least
`boundary_ratio` of the whole range, and `transformer_2` those after it, with a guidance scale of
its own. TI2V 5B is given a timestep for each token, all the same: here they are one; its latents
are `[B, 48, F, H/16, W/16]`. `wan_forward.py` has what starts from pictures and videos.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models.arguments import check_steps
from ddit_rt.models.base import BATCH, IMAGE, TEXT, BlockType, Grid, Guidance, Runner, TensorSpec
from ddit_rt.models.calls import (
    ModelCall,
    PipelineCall,
    PreparedCall,
    bind_call,
    check_known,
    check_shape,
    model_arguments,
    of_batch,
    refuse_ignored,
)
from ddit_rt.models.layered import LayeredFamily
from ddit_rt.models.wan_calls import (
    NEGATIVE,
    WanSizes,
    checked_batch,
    encode_prompts,
    finish,
    ignored_arguments,
    scales_of_call,
    second_scale,
)
from ddit_rt.models.wan_positions import rotary_tables
from ddit_rt.models.wan_variants import refused_parts

_PATCH = (1, 2, 2)
_BLOCK_ROWS = 6


class WanFamily(WanSizes, LayeredFamily):
    """Wan text-to-video, with one transformer or two experts."""

    name: ClassVar[str] = "wan"
    transformer_class: ClassVar[str] = "WanTransformer3DModel"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("WanPipeline",)
    conditioning_names: ClassVar[tuple[str, ...]] = (
        "encoder_hidden_states",
        NEGATIVE,
        "guidance_scale",
    )
    video: ClassVar[bool] = True
    channels_last: ClassVar[bool] = True
    time_driven: ClassVar[bool] = True
    guided_by_default: ClassVar[bool] = True
    # 81 frames of 720 x 1280 with guidance; 13824 features per token then stay below 2**31.
    default_ranges: ClassVar[Mapping[str, tuple[int, int]]] = {
        "batch": (1, 2),
        "image": (4, 75600),
    }

    def check_model(self, transformer: Any, pipeline: Any) -> None:
        """Text-to-video; other variants are refused by name."""
        refused = refused_parts(transformer, pipeline, _PATCH)
        if refused:
            raise UnsupportedModelError(
                f"this Wan model has {'; '.join(refused)}, which this version does not run; it "
                "runs text-to-video (Wan 2.1 T2V 1.3B and 14B, Wan 2.2 T2V A14B, TI2V 5B)"
            )

    def experts(self, pipeline: Any) -> tuple[nn.Module, ...]:
        """`transformer_2`, where the pipeline uses it."""
        return () if pipeline.config.boundary_ratio is None else (pipeline.transformer_2,)

    def expert_steps(self, pipeline: Any, scheduler: Any) -> tuple[int, ...]:
        """See `Family.expert_steps`; split as `WanPipeline.__call__` does."""
        if pipeline is None or pipeline.config.boundary_ratio is None:
            return super().expert_steps(pipeline, scheduler)
        boundary = pipeline.config.boundary_ratio * scheduler.config.num_train_timesteps
        return tuple(map(int, (scheduler.timesteps < boundary).tolist()))

    def base_patch_size(self, transformer: Any) -> int:
        """2, in one frame."""
        return _PATCH[-1]

    def latent_channels(self, transformer: Any) -> int:
        """16 in the published models."""
        return int(transformer.config.in_channels)

    def hidden_size(self, transformer: Any) -> int:
        """Heads times head width."""
        return int(transformer.config.num_attention_heads * transformer.config.attention_head_dim)

    def modulation_shape(self, transformer: Any) -> tuple[int, ...]:
        """Six rows for the blocks, one for the output norm."""
        return _BLOCK_ROWS + 1, self.hidden_size(transformer)

    def block_types(self, transformer: Any) -> tuple[BlockType, ...]:
        """One class: self-attention, cross-attention, feed-forward."""
        width = self.hidden_size(transformer)
        head = int(transformer.config.attention_head_dim)
        return (
            BlockType(
                name="WanTransformerBlock",
                path="blocks",
                inputs=(
                    TensorSpec(name="hidden_states", dims=(BATCH, IMAGE, width)),
                    TensorSpec(name="encoder_hidden_states", dims=(BATCH, TEXT, width)),
                    TensorSpec(name="temb", dims=(BATCH, _BLOCK_ROWS, width)),
                    TensorSpec(name="rotary_cos", dims=(1, IMAGE, 1, head)),
                    TensorSpec(name="rotary_sin", dims=(1, IMAGE, 1, head)),
                ),
                outputs=1,
                forward=_run_block,
                feed_forward=("ffn.net.0.proj", "ffn.net.2"),
            ),
        )

    def check_conditioning(
        self, transformer: Any, batch: int, conditioning: Mapping[str, Tensor | None]
    ) -> None:
        """See `Family.check_conditioning`."""
        check_known(conditioning, self.conditioning_names, "a Wan model")
        shape = (batch, "text tokens", transformer.config.text_dim)
        check_shape("encoder_hidden_states", conditioning.get("encoder_hidden_states"), shape)
        scale, negative = conditioning.get("guidance_scale"), conditioning.get(NEGATIVE)
        if (scale is None) != (negative is None):
            raise ValueError(
                f"guidance takes `{NEGATIVE}` and `guidance_scale` together; give both or neither"
            )
        if negative is not None:
            check_shape(NEGATIVE, negative, shape)
            if not isinstance(scale, Tensor) or scale.ndim > 1:
                raise ValueError(
                    f"got guidance_scale={scale!r}; expected a tensor without dimensions, such as "
                    "torch.tensor(5.0), or `[2]` with one for each expert"
                )

    def guidance(self, conditioning: Mapping[str, Tensor]) -> Guidance | None:
        """See `Family.guidance`."""
        if "guidance_scale" not in conditioning:
            return None
        text = conditioning["encoder_hidden_states"]
        return Guidance(
            prompt={"encoder_hidden_states": text},
            negative={"encoder_hidden_states": conditioning[NEGATIVE].to(text.device)},
            scale=conditioning["guidance_scale"].to(text.device, torch.float32),
        )

    def embed_text(self, transformer: Any, conditioning: Mapping[str, Tensor]) -> Tensor:
        """See `Family.embed_text`."""
        weight = transformer.patch_embedding.weight
        text: Tensor = transformer.condition_embedder.text_embedder(
            conditioning["encoder_hidden_states"].to(weight.device, weight.dtype)
        )
        return text

    def embed_time(
        self, transformer: Any, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """See `Family.embed_time`. The time is the same for all samples."""
        embedder, weight = transformer.condition_embedder, transformer.patch_embedding.weight
        # In float64: schedulers may give whole timesteps, which the model must get back exactly.
        levels = (timesteps.to(weight.device, torch.float64) * 1000).float()
        own = next(embedder.time_embedder.parameters()).dtype
        temb = embedder.time_embedder(embedder.timesteps_proj(levels).to(own)).to(weight.dtype)
        rows = embedder.time_proj(embedder.act_fn(temb)).unflatten(1, (_BLOCK_ROWS, -1))
        batch = conditioning["encoder_hidden_states"].shape[0]
        table = torch.cat((rows, temb[:, None]), dim=1)
        return table[:, None].repeat(1, batch, 1, 1)

    def time_signal(self, transformer: Any, timesteps: Tensor, *, projected: bool) -> Tensor:
        """See `Family.time_signal`. In float32 throughout, as TeaCache computes it."""
        embedder = transformer.condition_embedder
        own = next(embedder.time_embedder.parameters())
        levels = (timesteps.to(own.device, torch.float64) * 1000).float()
        temb: Tensor = embedder.time_embedder(embedder.timesteps_proj(levels).to(own.dtype)).float()
        if not projected:
            return temb
        layer = embedder.time_proj
        return F.linear(embedder.act_fn(temb), layer.weight.float(), layer.bias.float())

    def positions(
        self, transformer: Any, grid: Grid, text_tokens: int, *, stretch: int = 1
    ) -> tuple[Tensor, ...]:
        """Rotary cos and sin, each `[1, n, 1, head width]`, float32; text has no positions."""
        return rotary_tables(transformer.rope, grid, stretch)

    def embed_tokens(self, transformer: Any, tokens: Tensor) -> Tensor:
        """See `Family.embed_tokens`. The convolution's windows are the tokens."""
        convolution = transformer.patch_embedding
        return F.linear(tokens, convolution.weight.flatten(1), convolution.bias)

    def run_blocks(
        self,
        runners: Mapping[str, Sequence[Runner]],
        hidden: Tensor,
        text: Tensor,
        temb: Tensor,
        positions: tuple[Tensor, ...],
    ) -> Tensor:
        """See `Family.run_blocks`."""
        rows = temb[:, :_BLOCK_ROWS].contiguous()
        for block in runners["blocks"]:
            (hidden,) = block(hidden, text, rows, *positions)
        return hidden

    def modulate_output(self, transformer: Any, hidden: Tensor, temb: Tensor) -> Tensor:
        """See `Family.modulate_output`."""
        shift, scale = (transformer.scale_shift_table + temb[:, _BLOCK_ROWS:]).chunk(2, dim=1)
        normed: Tensor = transformer.norm_out(hidden.float()) * (1 + scale) + shift
        return normed.type_as(hidden)

    def project_output(self, transformer: Any, hidden: Tensor) -> Tensor:
        """See `Family.project_output`; features as `channels_last` says."""
        tokens: Tensor = transformer.proj_out(hidden)
        return tokens

    def embedding_layers(self, transformer: Any) -> tuple[nn.Linear | nn.Conv3d, nn.Linear]:
        """See `Family.embedding_layers`."""
        return transformer.patch_embedding, transformer.proj_out

    def set_timesteps(
        self, scheduler: Any, num_inference_steps: int, sigmas: Sequence[float] | None, grid: Grid
    ) -> None:
        """See `Family.set_timesteps`. Wan shifts by a constant of the scheduler's own."""
        check_steps(scheduler, num_inference_steps)
        if sigmas is None:
            scheduler.set_timesteps(num_inference_steps)
        elif "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(sigmas=np.asarray(sigmas))  # UniPC takes no list
        else:
            raise ValueError(
                f"got `sigmas`, which {type(scheduler).__name__} does not take; leave them out"
            )

    def read_call(
        self, pipeline: Any, scheduler: Any, arguments: Mapping[str, Any]
    ) -> PipelineCall:
        """See `Family.read_call`; follows `WanPipeline.__call__`."""
        call = bind_call(pipeline, arguments)
        refuse_ignored(call)
        batch = checked_batch(pipeline, call)
        size = (call["height"], call["width"])
        shape = self.latent_shape(pipeline, *size, batch, call["num_frames"])
        if call["latents"] is not None:
            check_shape("latents", call["latents"], shape)
        grid = Grid(frames=shape[2], height=shape[3] // _PATCH[1], width=shape[4] // _PATCH[2])
        self.set_timesteps(scheduler, call["num_inference_steps"], None, grid)
        scales = scales_of_call(pipeline, call)
        # A callback may turn guidance on, where there is a negative prompt for it.
        both = bool(scales) or call["negative_prompt_embeds"] is not None
        return PipelineCall(
            arguments=call,
            shape=shape,
            scales=scales,
            passes=1 + both,
            ignored=ignored_arguments(call),
        )

    def encode_call(self, pipeline: Any, scheduler: Any, call: PipelineCall) -> PreparedCall:
        """See `Family.encode_call`; follows `WanPipeline.__call__` up to its section 6."""
        arguments, shape = call.arguments, call.shape
        pipeline._guidance_scale = arguments["guidance_scale"]
        pipeline._guidance_scale_2 = second_scale(pipeline, arguments)
        pipeline._attention_kwargs = None
        pipeline._current_timestep = None
        pipeline._interrupt = False
        pipeline._num_timesteps = len(scheduler.timesteps)
        device = pipeline._execution_device
        conditioning = encode_prompts(pipeline, call, device)
        self.check_conditioning(pipeline.transformer, shape[0], conditioning)
        latents = pipeline.prepare_latents(
            shape[0],
            shape[1],
            arguments["height"],
            arguments["width"],
            arguments["num_frames"],
            torch.float32,
            device,
            arguments["generator"],
            arguments["latents"],
        )
        return PreparedCall(
            latents=latents,
            conditioning=conditioning,
            num_inference_steps=len(scheduler.timesteps),
            finish=lambda final: finish(pipeline, final, arguments),
        )

    def read_model_call(
        self, transformer: Any, shape: tuple[int, ...], arguments: Mapping[str, Any]
    ) -> ModelCall:
        """See `Family.read_model_call`."""
        names = ("hidden_states", "timestep", "encoder_hidden_states")
        given = model_arguments(arguments, names)
        latents = given.pop("hidden_states")
        check_shape("hidden_states", latents, shape)
        timestep = given.pop("timestep").reshape(-1)[:1].double() / 1000
        conditioning = of_batch(given, shape[0])
        self.check_conditioning(transformer, shape[0], conditioning)
        return ModelCall(latents=latents, timestep=timestep, conditioning=conditioning)

    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        """Images are for training adapters, which this version does not do for Wan."""
        raise UnsupportedModelError("this version trains no adapters for Wan")

    def pack_latents(self, latents: Tensor) -> Tensor:
        """The latents as they are."""
        return latents

    def unpack_latents(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The latents as they are."""
        return latents


def _run_block(
    block: nn.Module, hidden: Tensor, text: Tensor, temb: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    return (
        block(
            hidden_states=hidden,
            encoder_hidden_states=text,
            temb=temb,
            rotary_emb=(cos, sin),
        ),
    )
