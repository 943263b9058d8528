"""Latents of the training clips and embeddings of the captions, made once and kept on disk."""

import dataclasses

import torch
from demo_training.draw_videos import VideoConfig
from demo_training.settings import Settings
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from ddit_rt.lab.demo.videos import all_video_attributes
from video_training.clip_data import draw_clip_set
from video_training.text import MAX_SEQUENCE_LENGTH, WIDTH, load_text
from video_training.vae import CHANNELS, load_vae

FRAMES = 13
# Side in px: number of clips. A coarse step at 2p or 4p shows the model the smaller ones.
CLIP_COUNTS: dict[int, int] = {64: 1536, 32: 3072, 16: 1024}
_ENCODE_PIXELS = 16 * FRAMES * 32 * 32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LatentSet:
    """Latents ``[N, 8, 4, S/4, S/4]`` float16 of mean 0 and deviation 1, and captions ``[N]``.

    A caption is an index into `all_video_attributes`.
    """

    latents: torch.Tensor
    captions: torch.Tensor


def encode_latents(settings: Settings, side: int) -> LatentSet:
    """Draw and encode the clips of one size, or read what an earlier run has encoded."""
    path = settings.work / f"latents_{side}.pt"
    if not path.exists():
        drawn = draw_clip_set(
            VideoConfig(height=side, width=side, frames=FRAMES),
            CLIP_COUNTS[side],
            seed=settings.seed + 1000 + side,
            workers=settings.workers,
            cache=settings.work / f"clips_{side}.pt",
        )
        vae = load_vae(settings)
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        parts = []
        with torch.no_grad():
            for chunk in torch.split(drawn.clips, max(1, _ENCODE_PIXELS // (FRAMES * side * side))):
                x = chunk.to(settings.device).float().div(127.5).sub(1)
                z = vae.encode(x).latent_dist.mean.cpu()
                parts.append(((z - mean) / std).half())
        order = {attributes.labels: i for i, attributes in enumerate(all_video_attributes())}
        captions = torch.tensor([order[tuple(row)] for row in drawn.labels.tolist()])
        torch.save({"latents": torch.cat(parts).contiguous(), "captions": captions}, path)
    stored = torch.load(path, weights_only=True)
    return LatentSet(latents=stored["latents"], captions=stored["captions"])


def embed_captions(settings: Settings) -> torch.Tensor:
    """Embeddings ``[1153, 16, d]`` of all captions, as `WanPipeline` makes them.

    The last row is the empty prompt.
    """
    path = settings.work / "captions.pt"
    if not path.exists():
        pipeline = build_pipeline(settings, build_transformer())
        captions = [attributes.caption for attributes in all_video_attributes()] + [""]
        with torch.no_grad():
            embeds, _ = pipeline.encode_prompt(
                captions,
                do_classifier_free_guidance=False,
                max_sequence_length=MAX_SEQUENCE_LENGTH,
            )
        torch.save(embeds.clone(), path)
    table: torch.Tensor = torch.load(path, weights_only=True)
    return table


def build_transformer() -> WanTransformer3DModel:
    """The architecture: Wan's at 1.7 million parameters, patch (1, 2, 2) on 8 latent channels."""
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=128,
        ffn_dim=448,
        num_layers=6,
        rope_max_seq_len=64,
    )


def build_pipeline(settings: Settings, transformer: WanTransformer3DModel) -> WanPipeline:
    """A pipeline around `transformer` with the trained autoencoder and text encoder."""
    tokenizer, encoder = load_text(settings)
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=load_vae(settings),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer,
    )
    pipeline.to(settings.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
