"""FLUX.1 text to image (dev, schnell and their kin): `FluxPipeline`.

What it shares with FLUX's other pipelines says `flux_forward.py`. Here are the model's layers, for
adapters, TeaCache and blocks in a form of our own (`flux_blocks.py`), which takes fewer passes over
memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddit_rt.errors import UnsupportedModelError
from ddit_rt.models import flux_blocks
from ddit_rt.models.base import BATCH, IMAGE, JOINT, TEXT, BlockType, Grid, Runner, TensorSpec
from ddit_rt.models.calls import check_shape
from ddit_rt.models.family import NEGATIVE
from ddit_rt.models.flux_forward import FluxForwardFamily
from ddit_rt.models.layered import ALL_BLOCKS, LayeredFamily

_NEGATIVE_POOLED = f"{NEGATIVE}pooled_projections"


class FluxFamily(LayeredFamily, FluxForwardFamily):
    """FLUX.1 text-to-image."""

    name: ClassVar[str] = "flux"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    own_blocks: ClassVar[Mapping[str, tuple[str, ...]]] = flux_blocks.PASSED_BY
    scale: ClassVar[str] = "true_cfg_scale"

    def block_types(self, transformer: Any) -> tuple[BlockType, ...]:
        """Double-stream blocks, then single-stream blocks."""
        width = self.hidden_size(transformer)
        head = int(transformer.config.attention_head_dim)
        rotary = (
            TensorSpec(name="rotary_cos", dims=(JOINT, head)),
            TensorSpec(name="rotary_sin", dims=(JOINT, head)),
        )
        double = BlockType(
            name="FluxTransformerBlock",
            path="transformer_blocks",
            inputs=(
                TensorSpec(name="hidden_states", dims=(BATCH, IMAGE, width)),
                TensorSpec(name="encoder_hidden_states", dims=(BATCH, TEXT, width)),
                TensorSpec(name="modulation", dims=(BATCH, flux_blocks.DOUBLE_CHUNKS * width)),
                *rotary,
            ),
            outputs=2,
            forward=flux_blocks.double,
            feed_forward=(
                "ff.net.0.proj",
                "ff.net.2",
                "ff_context.net.0.proj",
                "ff_context.net.2",
            ),
        )
        single = BlockType(
            name="FluxSingleTransformerBlock",
            path="single_transformer_blocks",
            inputs=(
                TensorSpec(name="joint_hidden_states", dims=(BATCH, JOINT, width)),
                TensorSpec(name="modulation", dims=(BATCH, flux_blocks.SINGLE_CHUNKS * width)),
                *rotary,
            ),
            outputs=1,
            forward=flux_blocks.single,
            feed_forward=("proj_mlp", "proj_out"),
        )
        present = (double, single)
        return tuple(block_type for block_type in present if block_type.blocks(transformer))

    def check_conditioning(
        self, transformer: Any, batch: int, conditioning: Mapping[str, Any]
    ) -> None:
        """See `Family.check_conditioning`."""
        if not transformer.config.guidance_embeds and conditioning.get("guidance") is not None:
            raise ValueError(
                "this model was made without guidance embeddings (guidance_embeds=False), so it "
                "takes no guidance; leave `guidance` out"
            )
        scale = conditioning.get(self.scale)
        if scale is not None:
            check_shape(self.scale, scale, (), floating=False)
        super().check_conditioning(transformer, batch, conditioning)
        if scale is not None:
            pooled = (batch, transformer.config.pooled_projection_dim)
            check_shape(_NEGATIVE_POOLED, conditioning.get(_NEGATIVE_POOLED), pooled)

    def embed_text(self, transformer: Any, conditioning: Mapping[str, Tensor]) -> Tensor:
        """See `Family.embed_text`."""
        weight = transformer.context_embedder.weight
        text: Tensor = transformer.context_embedder(
            conditioning["encoder_hidden_states"].to(weight.device, weight.dtype)
        )
        return text

    def embed_time(
        self, transformer: Any, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """See `Family.embed_time`. Rounds t as the pipeline and the model's forward do."""
        weight = transformer.x_embedder.weight
        pooled = conditioning["pooled_projections"].to(weight.device, weight.dtype)
        steps, batch = timesteps.shape[0], pooled.shape[0]
        rounded = self.time(timesteps.to(weight.device), weight.dtype)
        levels = rounded.repeat_interleave(batch) * 1000
        arguments = [levels]
        if transformer.config.guidance_embeds:
            guidance = conditioning["guidance"].to(weight.device, weight.dtype)
            arguments.append(guidance.repeat(steps) * 1000)
        temb: Tensor = transformer.time_text_embed(*arguments, pooled.repeat(steps, 1))
        return flux_blocks.modulations(transformer, temb).reshape(steps, batch, -1)

    def modulation_shape(self, transformer: Any) -> tuple[int, ...]:
        """The embedded time, then the modulation of the output norm and of every block."""
        chunks = flux_blocks.TIME_CHUNKS
        chunks += flux_blocks.DOUBLE_CHUNKS * len(transformer.transformer_blocks)
        chunks += flux_blocks.SINGLE_CHUNKS * len(transformer.single_transformer_blocks)
        return (chunks * self.hidden_size(transformer),)

    def positions(
        self, transformer: Any, grid: Grid, text_tokens: int, *, stretch: int = 1
    ) -> tuple[Tensor, ...]:
        """Rotary cos and sin, each `[T + n, head width]`; text tokens all sit at (0, 0, 0)."""
        device = transformer.x_embedder.weight.device
        centre = (stretch - 1) / 2
        rows, columns = (
            torch.arange(count, dtype=torch.float32, device=device) * stretch + centre
            for count in (grid.height, grid.width)
        )
        ids = torch.zeros(text_tokens + grid.tokens, 3, dtype=torch.float32, device=device)
        ids[text_tokens:, 1] = rows.repeat_interleave(grid.width)
        ids[text_tokens:, 2] = columns.repeat(grid.height)
        cos, sin = transformer.pos_embed(ids)
        return cos, sin

    def positions_at(
        self, positions: tuple[Tensor, ...], places: Tensor, text_tokens: int
    ) -> tuple[Tensor, ...]:
        """See `Family.positions_at`."""
        return tuple(
            torch.cat((table[:text_tokens], table[text_tokens:].index_select(0, places)))
            for table in positions
        )

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
        double = runners.get("transformer_blocks", ())
        single = runners.get("single_transformer_blocks", ())
        chunks = [
            flux_blocks.TIME_CHUNKS,
            *[flux_blocks.DOUBLE_CHUNKS] * len(double),
            *[flux_blocks.SINGLE_CHUNKS] * len(single),
        ]
        _, *rows = torch.split(temb, [count * hidden.shape[-1] for count in chunks], dim=-1)
        joint: Tensor | None = None
        blocks = zip((*double, *single), rows, strict=True)
        for place, (block, row) in list(enumerate(blocks))[which]:
            if place < len(double):
                text, hidden = block(hidden, text, row.contiguous(), *positions)
                continue
            joint = torch.cat((text, hidden), dim=1) if joint is None else joint
            (joint,) = block(joint, row.contiguous(), *positions)
        if joint is None:
            return hidden, text
        length = text.shape[1]
        return joint[:, length:], joint[:, :length]

    def modulate_input(self, transformer: Any, hidden: Tensor, temb: Tensor) -> Tensor:
        """See `Family.modulate_input`."""
        if not len(transformer.transformer_blocks):
            raise UnsupportedModelError(
                "TeaCache goes by the first double-stream block, and this model has none "
                "(num_layers=0)"
            )
        time = temb[:, : hidden.shape[-1]]
        modulated: Tensor = transformer.transformer_blocks[0].norm1(hidden, emb=time)[0]
        return modulated

    def modulate_output(self, transformer: Any, hidden: Tensor, temb: Tensor) -> Tensor:
        """See `Family.modulate_output`."""
        width = hidden.shape[-1]
        scale, shift = temb[:, None, width : 3 * width].chunk(2, dim=-1)
        normed: Tensor = transformer.norm_out.norm(hidden) * (1 + scale) + shift
        return normed

    def embedding_layers(self, transformer: Any) -> tuple[nn.Linear, nn.Linear]:
        """See `Family.embedding_layers`."""
        return transformer.x_embedder, transformer.proj_out

    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        """See `Family.encode_images`. The most likely latent, not a draw."""
        vae = pipeline.vae
        encoded = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
        latents: Tensor = (encoded - vae.config.shift_factor) * vae.config.scaling_factor
        return latents
