"""Latents of the training pictures and embeddings of the captions, made once and kept on disk."""

import dataclasses

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from ddit_rt.lab.demo.images import all_attributes
from demo_training.draw_images import ImageConfig
from demo_training.picture_data import draw_set
from demo_training.settings import Settings
from demo_training.text import MAX_SEQUENCE_LENGTH, PHRASINGS, WIDTH, load_text, phrase
from demo_training.vae import load_vae

# (height, width) in px: number of pictures. Three resolutions, and a few that are not square.
PICTURE_COUNTS: dict[tuple[int, int], int] = {
    (32, 32): 16384,
    (64, 64): 16384,
    (128, 128): 12288,
    (64, 128): 1024,
    (128, 64): 1024,
    (96, 128): 1024,
    (128, 96): 1024,
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LatentSet:
    """Latents ``[N, 4, H/4, W/4]`` float16, mean 0 and deviation 1, and captions ``[N]``.

    A caption is an index into `all_attributes`.
    """

    latents: torch.Tensor
    captions: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CaptionTable:
    """Embeddings of every phrasing of every caption; the last row is the empty prompt.

    Attributes:
        sequence: ``[769, phrasings, 16, d]`` from T5.
        pooled: ``[769, phrasings, d]`` from CLIP.
    """

    sequence: torch.Tensor
    pooled: torch.Tensor


def encode_latents(settings: Settings, size: tuple[int, int]) -> LatentSet:
    """Draw and encode the pictures of one size, or read what an earlier run has encoded."""
    height, width = size
    path = settings.work / f"latents_{height}x{width}.pt"
    if not path.exists():
        config = ImageConfig(height=height, width=width)
        seed = settings.seed + 1000 * height + width
        drawn = draw_set(config, PICTURE_COUNTS[size], seed=seed, workers=settings.workers)
        vae, parts = load_vae(settings), []
        with torch.no_grad():
            for chunk in torch.split(drawn.pictures, 64):
                x = chunk.to(settings.device).float().div(127.5).sub(1)
                z = vae.encode(x).latent_dist.mean.sub(vae.config.shift_factor)
                parts.append(z.mul(vae.config.scaling_factor).half().cpu())
        order = {attributes.labels: i for i, attributes in enumerate(all_attributes())}
        captions = torch.tensor([order[a, b, c, d] for a, b, c, d in drawn.labels.tolist()])
        torch.save({"latents": torch.cat(parts).contiguous(), "captions": captions}, path)
    stored = torch.load(path, weights_only=True)
    return LatentSet(latents=stored["latents"], captions=stored["captions"])


def embed_captions(settings: Settings) -> CaptionTable:
    """Embed all captions through `FluxPipeline.encode_prompt`, exactly as sampling does."""
    path = settings.work / "captions.pt"
    if not path.exists():
        pipeline = build_pipeline(settings, build_transformer())
        rows = [[phrase(a, i) for i in range(PHRASINGS)] for a in all_attributes()]
        rows.append([""] * PHRASINGS)
        prompts = [prompt for row in rows for prompt in row]
        sequences, pooled = [], []
        with torch.no_grad():
            for i in range(0, len(prompts), 256):
                embeds, pool, _ = pipeline.encode_prompt(
                    prompts[i : i + 256], None, max_sequence_length=MAX_SEQUENCE_LENGTH
                )
                sequences.append(embeds.cpu())
                pooled.append(pool.cpu())
        shape = (len(rows), PHRASINGS)
        torch.save(
            {
                "sequence": torch.cat(sequences).reshape(*shape, MAX_SEQUENCE_LENGTH, WIDTH),
                "pooled": torch.cat(pooled).reshape(*shape, WIDTH),
            },
            path,
        )
    return CaptionTable(**torch.load(path, weights_only=True))


def build_transformer() -> FluxTransformer2DModel:
    """The architecture: FLUX's at 2.3 million parameters, patch 2 on 4 latent channels."""
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 14, 14),
    )


def build_pipeline(settings: Settings, transformer: FluxTransformer2DModel) -> FluxPipeline:
    """A pipeline around `transformer` with the trained autoencoder and text encoders."""
    clip_tokenizer, t5_tokenizer, clip, t5 = load_text(settings)
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    pipeline = FluxPipeline(
        scheduler=scheduler,
        vae=load_vae(settings),
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(settings.device)
