"""The shipped video pipeline: loads with diffusers, is small, draws what its captions say."""

import numpy as np
import pytest
import torch
from demo_training.draw_videos import VideoConfig, draw_video, draw_videos
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5EncoderModel

from ddit_rt.lab.demo import video_model_path
from ddit_rt.lab.demo.prompts import MAX_SEQUENCE_LENGTH
from ddit_rt.lab.demo.video_hits import video_hits
from ddit_rt.lab.demo.videos import all_video_attributes, is_held_out_video


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    loaded = WanPipeline.from_pretrained(video_model_path())
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_parts_are_the_classes_of_wan(pipeline: WanPipeline) -> None:
    assert isinstance(pipeline.transformer, WanTransformer3DModel)
    assert isinstance(pipeline.vae, AutoencoderKLWan)
    assert isinstance(pipeline.text_encoder, UMT5EncoderModel)
    assert isinstance(pipeline.scheduler, UniPCMultistepScheduler)
    assert pipeline.scheduler.config.use_flow_sigmas
    assert pipeline.transformer.dtype == torch.float32


def test_text_encoder_tells_which_word_has_which_colour(pipeline: WanPipeline) -> None:
    prompts = [
        "a red circle moving left on plain blue",
        "a blue circle moving left on plain red",
        "snow: 雪 & 42",
    ]
    embeds, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_SEQUENCE_LENGTH
    )
    assert embeds.shape[:2] == (3, MAX_SEQUENCE_LENGTH)
    assert (embeds[0] - embeds[1]).norm() / embeds[0].norm() > 0.1


def test_autoencoder_keeps_drawn_clips_and_scales_their_latents(pipeline: WanPipeline) -> None:
    videos, _ = draw_videos(VideoConfig(), seed=98, start=0, count=4)
    x = torch.from_numpy(videos).float() / 127.5 - 1
    vae = pipeline.vae
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mean
        decoded = vae.decode(z).sample
    assert z.shape == (4, vae.config.z_dim, 4, 16, 16)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    # Four videos are a small sample of colours.
    assert ((z - mean) / std).std() == pytest.approx(1, abs=0.3)
    error = ((decoded - x) / 2).square().mean().item()
    assert -10 * np.log10(error) > 21


@pytest.mark.slow
def test_clips_show_what_held_out_captions_say(pipeline: WanPipeline) -> None:
    chosen = [a for a in all_video_attributes() if is_held_out_video(a)][::9]
    drawn = [draw_video(a, VideoConfig(), 97, index) for index, a in enumerate(chosen)]
    exact = video_hits(torch.from_numpy(np.stack(drawn)).movedim(-1, 2), chosen)
    videos = pipeline(
        [a.caption for a in chosen],
        negative_prompt="",
        height=64,
        width=64,
        num_frames=13,
        num_inference_steps=16,
        guidance_scale=3.0,
        output_type="pt",
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        generator=torch.Generator().manual_seed(1),
    ).frames
    for name, hits in video_hits(videos.float(), chosen).items():
        assert exact[name].all(), name
        # 96% and more of each are right.
        assert hits.sum() >= len(chosen) - 2, name
