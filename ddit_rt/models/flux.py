"""FLUX.1 (dev, schnell and their kin): `FluxTransformer2DModel` behind `FluxPipeline`.

Latents are `[B, 16, H/8, W/8]`; the pipeline packs 2 x 2 latent pixels into a token before it
calls the model, so the base patch p is 2 although the model's own `patch_size` is 1. The model
was trained on images of several sizes with rotary positions 0, 1, 2, ... in each direction.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddit_rt import ops
from ddit_rt.errors import ShapeError, UnsupportedModelError
from ddit_rt.models import flux_blocks
from ddit_rt.models.arguments import noise_levels
from ddit_rt.models.base import (
    BATCH,
    IMAGE,
    JOINT,
    TEXT,
    BlockType,
    Grid,
    Guidance,
    Runner,
    TensorSpec,
)
from ddit_rt.models.calls import (
    ModelCall,
    PipelineCall,
    PreparedCall,
    batch_of,
    bind_call,
    check_known,
    check_shape,
    model_arguments,
    of_batch,
    refuse_ignored,
)
from ddit_rt.models.flux_calls import (
    NEGATIVES,
    PATCH,
    check_inputs,
    encode_prompts,
    finish,
    ignored_arguments,
    wants_true_cfg,
)
from ddit_rt.models.layered import LayeredFamily

_MODEL_CONDITIONING = ("encoder_hidden_states", "pooled_projections", "guidance")


class FluxFamily(LayeredFamily):
    """FLUX.1 text-to-image."""

    name: ClassVar[str] = "flux"
    transformer_class: ClassVar[str] = "FluxTransformer2DModel"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    own_blocks: ClassVar[Mapping[str, tuple[str, ...]]] = flux_blocks.PASSED_BY
    conditioning_names: ClassVar[tuple[str, ...]] = (
        *_MODEL_CONDITIONING,
        *NEGATIVES.values(),
        "true_cfg_scale",
    )

    def check_model(self, transformer: Any, pipeline: Any) -> None:
        """Refuses a model with further channels, such as FLUX.1-Fill and the control models."""
        del pipeline
        config = transformer.config
        if (config.out_channels or config.in_channels) != config.in_channels:
            raise UnsupportedModelError(
                f"got a FLUX model of in_channels={config.in_channels} and out_channels="
                f"{config.out_channels}, whose further channels a FluxPipeline does not fill; "
                "compile a FluxFillPipeline for FLUX.1-Fill"
            )

    def base_patch_size(self, transformer: Any) -> int:
        """2: the pipeline packs 2 x 2 latent pixels into one token."""
        return PATCH

    def latent_channels(self, transformer: Any) -> int:
        """`in_channels` of the model counts the packed channels."""
        return int(transformer.config.in_channels) // PATCH**2

    def hidden_size(self, transformer: Any) -> int:
        """Heads times head width."""
        return int(transformer.inner_dim)

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
        self, transformer: Any, batch: int, conditioning: Mapping[str, Tensor | None]
    ) -> None:
        """See `Family.check_conditioning`."""
        config = transformer.config
        check_known(conditioning, self.conditioning_names, "a FLUX model")
        expected: dict[str, tuple[int | str, ...]] = {
            "encoder_hidden_states": (batch, "text tokens", config.joint_attention_dim),
            "pooled_projections": (batch, config.pooled_projection_dim),
        }
        if config.guidance_embeds:
            expected["guidance"] = (batch,)
        elif conditioning.get("guidance") is not None:
            raise ValueError(
                "this model was made without guidance embeddings (guidance_embeds=False), so it "
                "takes no guidance; leave `guidance` out"
            )
        scale = conditioning.get("true_cfg_scale")
        second = [scale, *map(conditioning.get, NEGATIVES.values())]
        if any(tensor is not None for tensor in second):
            check_shape("true_cfg_scale", scale, (), floating=False)
            expected |= {negative: expected[name] for name, negative in NEGATIVES.items()}
        for name, shape in expected.items():
            check_shape(name, conditioning.get(name), shape)

    def guidance(self, conditioning: Mapping[str, Tensor]) -> Guidance | None:
        """See `Family.guidance`: true guidance. The distilled one is a model's argument."""
        if "true_cfg_scale" not in conditioning:
            return None
        own = {*NEGATIVES, "guidance"} & conditioning.keys()
        prompt = {name: conditioning[name] for name in own}
        negative = {name: conditioning[NEGATIVES.get(name, name)] for name in own}
        scale = conditioning["true_cfg_scale"]
        device = conditioning["encoder_hidden_states"].device
        return Guidance(prompt=prompt, negative=negative, scale=scale.to(device, torch.float32))

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
        """See `Family.embed_time`. Rounds t to the model's dtype as the model's forward does."""
        weight = transformer.x_embedder.weight
        pooled = conditioning["pooled_projections"].to(weight.device, weight.dtype)
        steps, batch = timesteps.shape[0], pooled.shape[0]
        levels = timesteps.to(weight.device, weight.dtype).repeat_interleave(batch) * 1000
        arguments = [levels]
        if transformer.config.guidance_embeds:
            guidance = conditioning["guidance"].to(weight.device, weight.dtype)
            arguments.append(guidance.repeat(steps) * 1000)
        temb: Tensor = transformer.time_text_embed(*arguments, pooled.repeat(steps, 1))
        rows = torch.cat((temb, flux_blocks.modulations(transformer, temb)), dim=-1)
        return rows.reshape(steps, batch, -1)

    def modulation_shape(self, transformer: Any) -> tuple[int, ...]:
        """The embedded time, then the modulation of every block."""
        chunks = 1 + flux_blocks.DOUBLE_CHUNKS * len(transformer.transformer_blocks)
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

    def embed_tokens(self, transformer: Any, tokens: Tensor) -> Tensor:
        """See `Family.embed_tokens`."""
        hidden: Tensor = transformer.x_embedder(tokens)
        return hidden

    def run_blocks(
        self,
        runners: Mapping[str, Sequence[Runner]],
        hidden: Tensor,
        text: Tensor,
        temb: Tensor,
        positions: tuple[Tensor, ...],
    ) -> Tensor:
        """See `Family.run_blocks`."""
        double = runners.get("transformer_blocks", ())
        single = runners.get("single_transformer_blocks", ())
        width = hidden.shape[-1]
        chunks = [flux_blocks.DOUBLE_CHUNKS] * len(double) + [flux_blocks.SINGLE_CHUNKS] * len(
            single
        )
        _, *rows = torch.split(temb, [width, *(count * width for count in chunks)], dim=-1)
        for block, row in zip(double, rows, strict=False):
            text, hidden = block(hidden, text, row.contiguous(), *positions)
        if not single:
            return hidden
        joint = torch.cat((text, hidden), dim=1)
        for block, row in zip(single, rows[len(double) :], strict=True):
            (joint,) = block(joint, row.contiguous(), *positions)
        return joint[:, text.shape[1] :]

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
        normed: Tensor = transformer.norm_out(hidden, temb[:, : hidden.shape[-1]])
        return normed

    def project_output(self, transformer: Any, hidden: Tensor) -> Tensor:
        """See `Family.project_output`."""
        tokens: Tensor = transformer.proj_out(hidden)
        return tokens

    def embedding_layers(self, transformer: Any) -> tuple[nn.Linear, nn.Linear]:
        """See `Family.embedding_layers`."""
        return transformer.x_embedder, transformer.proj_out

    def default_size(self, pipeline: Any) -> tuple[int, int]:
        """See `Family.default_size`."""
        size = int(pipeline.default_sample_size * pipeline.vae_scale_factor)
        return size, size

    def latent_shape(
        self, pipeline: Any, height: int, width: int, batch: int, num_frames: int | None = None
    ) -> tuple[int, ...]:
        """See `Family.latent_shape`. Odd sizes round down to whole tokens, as the pipeline does."""
        if num_frames is not None:
            raise ShapeError(f"got num_frames={num_frames}; FLUX makes images: leave it out")
        unit = pipeline.vae_scale_factor * PATCH
        if height < unit or width < unit:
            raise ShapeError(
                f"got {height} x {width} pixels; this pipeline's smallest image is {unit} x {unit}"
            )
        channels = self.latent_channels(pipeline.transformer)
        return batch, channels, PATCH * (height // unit), PATCH * (width // unit)

    def set_timesteps(
        self, scheduler: Any, num_inference_steps: int, sigmas: Sequence[float] | None, grid: Grid
    ) -> None:
        """See `Family.set_timesteps`; follows `FluxPipeline.__call__`, section 5."""
        # Imported here: it pulls in all of transformers, which takes seconds.
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

        levels = noise_levels(scheduler, num_inference_steps, sigmas)
        config = scheduler.config
        shift: dict[str, float] = {}
        if "mu" in inspect.signature(scheduler.set_timesteps).parameters:
            shift["mu"] = calculate_shift(
                grid.tokens,
                config.get("base_image_seq_len", 256),
                config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5),
                config.get("max_shift", 1.15),
            )
        retrieve_timesteps(scheduler, num_inference_steps, sigmas=levels, **shift)

    def read_call(
        self, pipeline: Any, scheduler: Any, arguments: Mapping[str, Any]
    ) -> PipelineCall:
        """See `Family.read_call`; follows `FluxPipeline.__call__`."""
        call = bind_call(pipeline, arguments)
        refuse_ignored(call)
        guided = wants_true_cfg(call)
        rows, columns = self.default_size(pipeline)
        call["height"] = rows if call["height"] is None else call["height"]
        call["width"] = columns if call["width"] is None else call["width"]
        check_inputs(pipeline, call)
        batch = batch_of(call)
        shape = self.latent_shape(pipeline, call["height"], call["width"], batch)
        if call["latents"] is not None:
            check_shape("latents", call["latents"], _packed_shape(shape))
        grid = Grid(height=shape[2] // PATCH, width=shape[3] // PATCH)
        self.set_timesteps(scheduler, call["num_inference_steps"], call["sigmas"], grid)
        scales = (float(call["true_cfg_scale"]),) if guided else ()
        distilled = bool(pipeline.transformer.config.guidance_embeds)
        return PipelineCall(
            arguments=call,
            shape=shape,
            scales=scales,
            passes=1 + guided,
            ignored=ignored_arguments(arguments, distilled=distilled),
        )

    def encode_call(self, pipeline: Any, scheduler: Any, call: PipelineCall) -> PreparedCall:
        """See `Family.encode_call`; follows `FluxPipeline.__call__` up to its section 6."""
        arguments, shape = call.arguments, call.shape
        pipeline._guidance_scale = arguments["guidance_scale"]
        pipeline._joint_attention_kwargs = {}
        pipeline._current_timestep = None
        pipeline._interrupt = False
        pipeline._num_timesteps = len(scheduler.timesteps)
        device = pipeline._execution_device
        conditioning = encode_prompts(pipeline, call)
        embeds = conditioning["encoder_hidden_states"]
        packed, _ = pipeline.prepare_latents(
            shape[0],
            shape[1],
            arguments["height"],
            arguments["width"],
            embeds.dtype,
            device,
            arguments["generator"],
            arguments["latents"],
        )
        if pipeline.transformer.config.guidance_embeds:
            conditioning["guidance"] = torch.full(
                (shape[0],),
                float(arguments["guidance_scale"]),
                dtype=torch.float32,
                device=device,
            )
        self.check_conditioning(pipeline.transformer, shape[0], conditioning)
        return PreparedCall(
            latents=self.unpack_latents(packed, shape).float(),
            conditioning=conditioning,
            num_inference_steps=len(scheduler.timesteps),
            finish=lambda final: finish(pipeline, final.to(embeds.dtype), arguments),
        )

    def read_model_call(
        self, transformer: Any, shape: tuple[int, ...], arguments: Mapping[str, Any]
    ) -> ModelCall:
        """See `Family.read_model_call`. The positions are those of `shape`, as the pipeline's."""
        given = model_arguments(arguments, ("hidden_states", "timestep", *_MODEL_CONDITIONING))
        latents = given.pop("hidden_states")
        check_shape("hidden_states", latents, _packed_shape(shape))
        timestep = given.pop("timestep").reshape(-1)[:1].float()
        conditioning = of_batch(given, shape[0])
        self.check_conditioning(transformer, shape[0], conditioning)
        return ModelCall(
            latents=self.unpack_latents(latents, shape),
            timestep=timestep,
            conditioning=conditioning,
        )

    def encode_images(self, pipeline: Any, pixels: Tensor) -> Tensor:
        """See `Family.encode_images`. The most likely latent, not a draw."""
        vae = pipeline.vae
        encoded = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
        latents: Tensor = (encoded - vae.config.shift_factor) * vae.config.scaling_factor
        return latents

    def pack_latents(self, latents: Tensor) -> Tensor:
        """Packed tokens `[B, n, 4C]`, the layout inside `FluxPipeline`."""
        return ops.pack(latents, PATCH)

    def unpack_latents(self, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
        """See `Family.unpack_latents`."""
        return ops.unpack(latents.contiguous(), PATCH, shape[-2], shape[-1])


def _packed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of latents `[B, C, H, W]` as the pipeline packs them."""
    batch, channels, height, width = shape
    return batch, height * width // PATCH**2, channels * PATCH**2
