"""Stage `evaluate`: how often the shipped model shows what a caption says."""

import torch
from demo_training.draw_videos import VideoConfig, draw_video
from diffusers import WanPipeline
from tqdm import tqdm

from ddit_rt.lab.demo import video_model_path
from ddit_rt.lab.demo.video_hits import video_hits
from ddit_rt.lab.demo.videos import VideoAttributes, all_video_attributes, is_held_out_video
from video_training.latents import FRAMES
from video_training.text import MAX_SEQUENCE_LENGTH

_COUNT, _BATCH, _SEED, _STEPS, _GUIDANCE = 48, 8, 300_000, 24, 3.0


def evaluate() -> None:
    """Print the share of clips that show their caption, drawn clips first: the measure's own limit.

    See `video_hits`.
    """
    pipeline = WanPipeline.from_pretrained(video_model_path())
    pipeline.set_progress_bar_config(disable=True)
    for held_out in (False, True):
        pool = [a for a in all_video_attributes() if is_held_out_video(a) == held_out]
        chosen = [pool[i * len(pool) // _COUNT] for i in range(_COUNT)]
        name = "held out" if held_out else "trained"
        tqdm.write(f"{name}, drawn: {_line(_drawn(chosen), chosen)}")
        tqdm.write(f"{name}, generated: {_line(_generated(pipeline, chosen), chosen)}")


def _drawn(chosen: list[VideoAttributes]) -> torch.Tensor:
    clips = [draw_video(a, VideoConfig(), _SEED, i) for i, a in enumerate(chosen)]
    return torch.stack([torch.from_numpy(clip) for clip in clips]).movedim(-1, 2)


def _generated(pipeline: WanPipeline, chosen: list[VideoAttributes]) -> torch.Tensor:
    parts = []
    for start in range(0, len(chosen), _BATCH):
        prompts = [a.caption for a in chosen[start : start + _BATCH]]
        parts.append(
            pipeline(
                prompts,
                negative_prompt="",
                height=VideoConfig().height,
                width=VideoConfig().width,
                num_frames=FRAMES,
                num_inference_steps=_STEPS,
                guidance_scale=_GUIDANCE,
                output_type="pt",
                max_sequence_length=MAX_SEQUENCE_LENGTH,
                generator=torch.Generator().manual_seed(_SEED + start),
            ).frames
        )
    return torch.cat(parts).float()


def _line(clips: torch.Tensor, chosen: list[VideoAttributes]) -> str:
    hits = video_hits(clips, chosen)
    return ", ".join(f"{name} {100 * hit.float().mean():.1f}%" for name, hit in hits.items())
