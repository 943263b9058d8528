"""Drawn samples, their latents and the embeddings of captions, made once and kept on disk."""

import itertools
import multiprocessing
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo_training.kind import Kind, Size
from demo_training.settings import Settings, finished
from demo_training.text import load_text

_CHUNK = 32
_ENCODED_PIXELS = 64 * 128 * 128


def encode_latents(kind: Kind, settings: Settings, size: Size) -> dict[str, Tensor]:
    """Draw and encode the samples of one size, or read what an earlier run has encoded.

    Returns:
        `latents` ``[N, C, (F,) H/4, W/4]`` float16, mean 0 and deviation 1, and `captions` ``[N]``,
        indices into the kind's `attributes`; on the settings' device.
    """
    path = settings.work / f"latents_{size[0]}x{size[1]}.pt"
    if not path.exists():
        more = 1 if settings.device == "cpu" else kind.transformer.on_gpu
        count = settings.count(kind.transformer.counts[size] * more)
        seed = settings.seed + 1000 * size[0] + size[1]
        samples, labels = draw(kind, settings, size, count, seed)
        vae, parts = load_vae(kind, settings), []
        at_once = max(1, _ENCODED_PIXELS // samples[0, 0].numel())
        with torch.no_grad():
            for chunk in torch.split(samples, at_once):
                z = vae.encode(chunk.to(settings.device).float().div(127.5).sub(1)).latent_dist.mean
                parts.append(kind.normalise(z, vae.config).half().cpu())
        order = {attributes.labels: place for place, attributes in enumerate(kind.attributes)}
        captions = torch.tensor([order[tuple(row)] for row in labels.tolist()])
        torch.save({"latents": torch.cat(parts).contiguous(), "captions": captions}, path)
    return torch.load(path, map_location=settings.device, weights_only=True)


def embed_captions(kind: Kind, settings: Settings) -> dict[str, Any]:
    """Embed the captions in all their phrasings, or read what an earlier run has embedded.

    Returns:
        `table`, embeddings ``[prompts, ...]`` of every prompt by name, and `rows`
        ``[captions + 1, phrasings]`` int64, a prompt each, the empty one in the last row; on the
        settings' device.
    """
    path = settings.work / "captions.pt"
    if not path.exists():
        pipeline = build_pipeline(kind, settings, kind.build_transformer())
        phrased = [[kind.phrase(a, n) for n in range(kind.phrasings)] for a in kind.attributes]
        phrased.append([""] * kind.phrasings)
        prompts = list(dict.fromkeys(itertools.chain.from_iterable(phrased)))
        parts: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for start in range(0, len(prompts), 256):
                for name, value in kind.embed(pipeline, prompts[start : start + 256]).items():
                    parts.setdefault(name, []).append(value.cpu())
        places = {prompt: place for place, prompt in enumerate(prompts)}
        rows = torch.tensor([[places[prompt] for prompt in row] for row in phrased])
        table = {name: torch.cat(part) for name, part in parts.items()}
        torch.save({"table": table, "rows": rows}, path)
    return torch.load(path, map_location=settings.device, weights_only=True)


def load_vae(kind: Kind, settings: Settings) -> Any:
    """The trained autoencoder, whose configuration holds the statistics of its latents."""
    state = finished(settings, "vae", settings.device)
    vae = kind.build_vae(**state["statistics"])
    vae.load_state_dict(state["vae"])
    return vae.to(settings.device).eval()


def build_pipeline(kind: Kind, settings: Settings, transformer: Any) -> Any:
    """A pipeline around `transformer` with the trained autoencoder and text encoders."""
    pipeline = kind.pipeline(load_text(kind, settings), load_vae(kind, settings), transformer)
    pipeline.to(settings.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    kind: Kind,
    settings: Settings,
    size: Size,
    count: int,
    seed: int,
    cache: pathlib.Path | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw samples ``0 .. count - 1`` of a series in several processes, or read them from a file.

    Returns:
        Samples ``[N, 3, (F,) H, W]`` uint8, and labels ``[N, attributes]``.
    """
    if cache is not None and cache.exists():
        samples, labels = torch.load(cache, weights_only=True)
        return samples, labels
    tasks = [
        (*kind.series(size, settings.work), seed, start, min(_CHUNK, count - start))
        for start in range(0, count, _CHUNK)
    ]
    if settings.workers == 1:
        chunks = [_draw_chunk(task) for task in tasks]
    else:
        with multiprocessing.get_context("fork").Pool(settings.workers) as pool:
            chunks = pool.map(_draw_chunk, tasks, chunksize=1)
    samples = torch.from_numpy(np.concatenate([chunk[0] for chunk in chunks]))
    labels = torch.tensor([row for chunk in chunks for row in chunk[1]])
    if cache is not None:
        torch.save((samples, labels), cache)
    return samples, labels


def _draw_chunk(
    task: tuple[Callable[..., Any], Any, int, int, int],
) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    series, *arguments = task
    samples, drawn = series(*arguments)
    return samples, [attributes.labels for attributes in drawn]
