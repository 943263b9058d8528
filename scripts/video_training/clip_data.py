"""Clips of a training stage, drawn once and kept on disk."""

import dataclasses
import multiprocessing
import pathlib

import numpy as np
import torch
from demo_training.draw_videos import VideoConfig, draw_videos

_CHUNK = 32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClipSet:
    """Videos ``[N, 3, F, H, W]`` uint8, labels ``[N, 5]`` (see `VideoAttributes.labels`)."""

    clips: torch.Tensor
    labels: torch.Tensor


def draw_clip_set(
    config: VideoConfig, count: int, *, seed: int, workers: int, cache: pathlib.Path
) -> ClipSet:
    """Draw clips ``0 .. count - 1`` of a series, or read them from an earlier run.

    Args:
        config: Size of the clips.
        count: How many.
        seed: Seed of the series.
        workers: Processes that draw.
        cache: File to keep them in.
    """
    if not cache.exists():
        tasks = [(config, seed, i, min(_CHUNK, count - i)) for i in range(0, count, _CHUNK)]
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            chunks = pool.map(_draw_chunk, tasks, chunksize=1)
        clips = torch.from_numpy(np.concatenate([chunk[0] for chunk in chunks]))
        labels = torch.tensor([row for chunk in chunks for row in chunk[1]])
        torch.save({"clips": clips, "labels": labels}, cache)
    stored = torch.load(cache, weights_only=True)
    return ClipSet(clips=stored["clips"], labels=stored["labels"])


def _draw_chunk(
    task: tuple[VideoConfig, int, int, int],
) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    clips, drawn = draw_videos(*task)
    return clips, [attributes.labels for attributes in drawn]
