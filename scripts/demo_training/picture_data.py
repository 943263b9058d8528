"""Draws the pictures of a training stage in several processes and keeps them on disk."""

import dataclasses
import multiprocessing
import pathlib

import numpy as np
import torch

from demo_training.draw_images import ImageConfig, draw_series

_CHUNK = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PictureSet:
    """Pictures ``[N, 3, H, W]`` uint8 and their labels ``[N, 4]`` (see `Attributes.labels`)."""

    pictures: torch.Tensor
    labels: torch.Tensor


def draw_set(
    config: ImageConfig, count: int, *, seed: int, workers: int, cache: pathlib.Path | None = None
) -> PictureSet:
    """Draw pictures ``0 .. count - 1`` of a series, or read them from an earlier run.

    Args:
        config: Size of the pictures.
        count: How many.
        seed: Seed of the series.
        workers: Processes that draw.
        cache: File to keep them in.
    """
    if cache is not None and cache.exists():
        stored = torch.load(cache, weights_only=True)
        return PictureSet(pictures=stored["pictures"], labels=stored["labels"])
    tasks = [(config, seed, i, min(_CHUNK, count - i)) for i in range(0, count, _CHUNK)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        chunks = pool.map(_draw_chunk, tasks, chunksize=1)
    pictures = torch.from_numpy(np.concatenate([chunk[0] for chunk in chunks]))
    labels = torch.tensor([row for chunk in chunks for row in chunk[1]])
    if cache is not None:
        torch.save({"pictures": pictures, "labels": labels}, cache)
    return PictureSet(pictures=pictures, labels=labels)


def _draw_chunk(
    task: tuple[ImageConfig, int, int, int],
) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    pictures, drawn = draw_series(*task)
    return pictures, [attributes.labels for attributes in drawn]
