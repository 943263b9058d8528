"""Wan text-to-video (2.1, 2.2 A14B and TI2V 5B): `WanPipeline`.

What it shares with Wan's other pipelines says `wan_forward.py`; here are the model's layers. Rotary
positions count frames, rows and columns; text enters by cross-attention, which no patch size
touches. The modulation input of a step is seven rows of d: six for the blocks, one for the output
norm. TI2V 5B is given a timestep for each token, all the same: here they are one; its latents are
`[B, 48, F, H/16, W/16]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddit_rt.errors import ShapeError
from ddit_rt.models.base import BATCH, IMAGE, TEXT, BlockType, Grid, Runner, TensorSpec
from ddit_rt.models.calls import PipelineCall
from ddit_rt.models.layered import ALL_BLOCKS, LayeredFamily
from ddit_rt.models.wan_forward import WanForwardFamily

_BLOCK_ROWS = 6


class WanFamily(LayeredFamily, WanForwardFamily):
    """Wan text-to-video, with one transformer or two experts."""

    name: ClassVar[str] = "wan"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("WanPipeline",)
    timed: ClassVar[tuple[str, ...]] = (
        *WanForwardFamily.timed,
        "condition_embedder.time_proj",
    )
    channels_last: ClassVar[bool] = True
    time_driven: ClassVar[bool] = True

    def refused(self, config: Any) -> list[str]:
        """See `WanForwardFamily.refused`."""
        refused, own = [], config.in_channels
        if config.image_dim is not None or config.added_kv_proj_dim is not None:
            refused.append("image conditioning (image_dim, added_kv_proj_dim)")
        if own != (config.out_channels or own):
            refused.append(
                f"in_channels={own} with out_channels={config.out_channels} (image-to-video or "
                "control latents)"
            )
        return refused

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
        assert stretch == 1, "patch adapters, whose tokens lie further apart, are FLUX's"
        rope, sizes = transformer.rope, (grid.frames, grid.height, grid.width)
        if max(sizes) > rope.max_seq_len:
            raise ShapeError(
                f"got {grid.frames} x {grid.height} x {grid.width} tokens; this model has "
                f"positions for at most {rope.max_seq_len} in each direction"
            )
        pixels = (grid.frames, grid.height * self.patch, grid.width * self.patch)
        tables = rope(torch.empty(1, 1, *pixels, dtype=torch.float32, device="meta"))
        return tuple(table.float() for table in tables)

    def positions_at(
        self, positions: tuple[Tensor, ...], places: Tensor, text_tokens: int
    ) -> tuple[Tensor, ...]:
        """See `Family.positions_at`."""
        return tuple(table.index_select(1, places) for table in positions)

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
        which: slice = ALL_BLOCKS,
    ) -> tuple[Tensor, Tensor]:
        """See `Family.run_blocks`."""
        rows = temb[:, :_BLOCK_ROWS].contiguous()
        for block in runners["blocks"][which]:
            (hidden,) = block(hidden, text, rows, *positions)
        return hidden, text

    def modulate_output(self, transformer: Any, hidden: Tensor, temb: Tensor) -> Tensor:
        """See `Family.modulate_output`."""
        shift, scale = (transformer.scale_shift_table + temb[:, _BLOCK_ROWS:]).chunk(2, dim=1)
        normed: Tensor = transformer.norm_out(hidden.float()) * (1 + scale) + shift
        return normed.type_as(hidden)

    def embedding_layers(self, transformer: Any) -> tuple[nn.Linear | nn.Conv3d, nn.Linear]:
        """See `Family.embedding_layers`."""
        return transformer.patch_embedding, transformer.proj_out

    def read_call(
        self, pipeline: Any, scheduler: Any, arguments: Mapping[str, Any]
    ) -> PipelineCall:
        """See `Family.read_call`."""
        call = super().read_call(pipeline, scheduler, arguments)
        # A callback may turn guidance on, where there is a negative prompt for it.
        both = call.guided or call.arguments["negative_prompt_embeds"] is not None
        return replace(call, passes=1 + both)


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
